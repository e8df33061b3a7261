"""Makes ``attn_implementation="fastprefix"`` known to transformers: attention and, beside it, masks."""

from transformers import AttentionInterface, AttentionMaskInterface

from fastprefix.hf.attention.function import NAME, attention_forward
from fastprefix.hf.attention.masks import mask_function

AttentionInterface.register(NAME, attention_forward)
# With this one missing, transformers would hand every layer a mask of None and padding would be attended to.
AttentionMaskInterface.register(NAME, mask_function)
