"""fastprefix: prefix tuning and its family at the cost of the frozen model. See README.md."""

from fastprefix.functional import explain, prefix_attention

__version__ = "0.1.0"
__all__ = ["__version__", "explain", "prefix_attention"]
