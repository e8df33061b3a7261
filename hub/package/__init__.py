"""fastprefix on the Kernel Hub: attention over a shared prefix and each sample's own content, as one softmax."""

from .attention_interface import attention_forward
from .errors import UnsupportedError
from .functional import explain, prefix_attention

# transformers takes a function by its name (``org/fastprefix:attention_forward``) only from kernels that have this one.
flash_attn_forward = attention_forward

__all__ = ["UnsupportedError", "attention_forward", "explain", "flash_attn_forward", "prefix_attention"]
