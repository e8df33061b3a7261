"""The types that all other modules share: the operator's arguments, its gradients and the names of the backends.

Dims: ``B`` batch, ``H`` query heads, ``H_kv`` key/value heads, ``G = H // H_kv``, ``S`` query tokens, ``T`` content
keys, ``P`` prefix tokens, ``N`` prefixes in a bank, ``D`` head dim of q/k, ``D_v`` head dim of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

# The modes in which a call is measured. "lowest" is a backward in the lowest layer of a frozen model: nothing below the
# attention is trained there, so only the prefix gets gradients.
Mode = Literal["forward", "backward", "lowest", "decode"]
INPUTS = ("q", "k", "v", "prefix_k", "prefix_v")
DTYPES: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

BackendName = Literal["reference", "native", "aten", "triton", "cuda"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

# A bias at or below this means "not visible". transformers writes finfo.min, others -inf: neither is a number that a
# score could be added to, and a softmax over a row of either must be empty instead of uniform.
MASKED_BIAS = -1e37


@dataclass(frozen=True)
class AttentionArgs:
    """One call of the operator, validated. Shapes are those of :func:`fastprefix.prefix_attention`.

    ``gate`` is not among them: two softmaxes are two calls (see ``calls/gates.py``).
    """

    q: Tensor  # [B, H, S, D]
    k: Tensor  # [B, H_kv, T, D]
    v: Tensor  # [B, H_kv, T, D_v]
    prefix_k: Tensor  # [H_kv, P, D]; a bank is [N, H_kv, P, D] or, packed, [H_kv, P, D] with P the sum of its lengths
    prefix_v: Tensor  # likewise, D_v
    scale: float
    causal: bool = True
    key_padding_mask: Tensor | None = None  # [B, T] bool
    segment_ids: Tensor | None = None  # [B, T] int
    q_start: int | Tensor | None = None  # int, [] or [B]; None is T - S
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [H]
    bias: Tensor | None = None  # broadcastable to [B, H, S, T]; float, or bool with True = visible
    bias_grad: bool = False  # whether the backward will be asked for dbias
    prefix_bias: Tensor | None = None  # prefix_k's shape without D: [H_kv, P], of a padded bank [N, H_kv, P]
    prefix_ids: Tensor | None = None  # [B] or [B, S]
    prefix_lens: Tensor | None = None  # [N]
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None  # [] int64, present when dropout_p > 0

    @property
    def num_prefix_tokens(self) -> int:
        """P: of a padded bank its longest, of a packed one all together."""
        return self.prefix_k.shape[-2]

    @property
    def packed(self) -> bool:
        """Whether the prefixes of a bank lie one after the other in one tensor."""
        return self.prefix_ids is not None and self.prefix_k.dim() == 3

    @property
    def num_prefixes(self) -> int:
        """N, 1 without a bank."""
        if self.packed:
            assert self.prefix_lens is not None
            return self.prefix_lens.shape[0]
        return self.prefix_k.shape[0] if self.prefix_k.dim() == 4 else 1

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.prefix_k.shape[-3]


class Needs(NamedTuple):
    """Which gradients the backward has to produce. The others are not computed."""

    q: bool
    k: bool
    v: bool
    prefix_k: bool
    prefix_v: bool
    bias: bool = False
    prefix_bias: bool = False

    @property
    def content(self) -> bool:
        """Whether the content part has any work at all."""
        return self.q or self.k or self.v or self.bias

    @property
    def prefix(self) -> bool:
        """Whether the prefix part has any work at all."""
        return self.q or self.prefix_k or self.prefix_v or self.prefix_bias


class Grads(NamedTuple):
    """Gradients in the order of :class:`Needs`; None where it says so."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    bias: Tensor | None = None
    prefix_bias: Tensor | None = None


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The log-sum-exp is kept in fp32, in fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_bshd(x: Tensor) -> Tensor:
    """``[B, H, S, X]`` in [B, S, H, X] storage, as models hold it; free when it already is."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
