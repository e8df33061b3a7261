"""The operator in an attention layer of one's own: one prefix for all rows, without copies; only torch is needed.

    python examples/custom_attention.py

The layer is frozen but for its prefix, whose gradient is the sum over the batch.
"""

import torch
from torch import nn

from fastprefix import explain, prefix_attention

B, S, H, H_KV, D, P = 4, 32, 8, 2, 16, 12  # rows, tokens, query heads, key/value heads, head dim, prefix tokens


class PrefixedAttention(nn.Module):
    """Causal self-attention with grouped key/value heads and a trained prefix of P tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, heads * D, bias=False) for heads in (H, H_KV, H_KV))
        self.out = nn.Linear(H * D, H * D, bias=False)
        self.requires_grad_(False)  # the layer is frozen, only the prefix below is trained
        self.prefix_k = nn.Parameter(0.02 * torch.randn(H_KV, P, D))
        self.prefix_v = nn.Parameter(0.02 * torch.randn(H_KV, P, D))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S, heads * D]`` as ``[B, heads, S, D]``, a view."""
        return x.unflatten(-1, (-1, D)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S, H * D]`` to the same shape."""
        q, k, v = (self.heads(projection(x)) for projection in (self.q, self.k, self.v))
        o = prefix_attention(q, k, v, self.prefix_k, self.prefix_v, causal=True)  # [B, H, S, D]
        return self.out(o.transpose(1, 2).flatten(2))


torch.manual_seed(0)
layer, x = PrefixedAttention(), torch.randn(B, S, H * D)
y = layer(x)
y.square().mean().backward()
print(f"output {list(y.shape)}, gradient of the prefix {list(layer.prefix_k.grad.shape)}")
q, k, v = (layer.heads(projection(x)) for projection in (layer.q, layer.k, layer.v))
print(explain(q, k, v, layer.prefix_k, layer.prefix_v))  # which backend runs, and why the others do not
