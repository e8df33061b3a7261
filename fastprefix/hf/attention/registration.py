"""Registers ``attn_implementation="fastprefix"`` with transformers: the attention function and the mask function."""

from transformers import AttentionInterface, AttentionMaskInterface

from fastprefix.hf.attention.function import NAME, attention_forward
from fastprefix.hf.attention.masks import mask_function

AttentionInterface.register(NAME, attention_forward)
# Without this registration transformers would pass every layer a mask of None, and padding would be attended to.
AttentionMaskInterface.register(NAME, mask_function)
