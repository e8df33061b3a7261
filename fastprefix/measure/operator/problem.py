"""The shapes of one attention call, and random inputs of these shapes that all candidates share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from fastprefix.types import DTYPES, INPUTS, Mode

# Here "backward" and "lowest" are forward and backward together.
MODES: tuple[Mode, ...] = get_args(Mode)
TRAINED: dict[Mode, tuple[str, ...]] = {"forward": (), "backward": INPUTS, "lowest": INPUTS[3:], "decode": ()}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Shapes of one call: ``S`` query tokens on ``T`` content keys and ``P`` prefix tokens.

    Dims as in :func:`fastprefix.prefix_attention`. ``T = S`` in training; in decoding S is 1 and T is the number of
    content tokens in the cache, the new token included.

    Raises:
        ValueError: a size is too small, ``H`` is no multiple of ``H_kv``, or there are more causal queries than keys.
    """

    B: int
    H: int
    H_kv: int
    S: int
    T: int
    P: int
    D: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    causal: bool = True

    def __post_init__(self) -> None:
        small = [n for n in ("B", "H", "H_kv", "S", "T", "D") if getattr(self, n) < 1]
        if small or self.P < 0:
            raise ValueError(f"problem: {', '.join(small) or 'P'} too small in {self}")
        if self.H % self.H_kv:
            raise ValueError(f"problem: H = {self.H} is no multiple of H_kv = {self.H_kv}")
        if self.causal and self.T < self.S:
            raise ValueError(f"problem: {self.S} causal queries on {self.T} keys")

    @classmethod
    def train(cls, B: int, H: int, H_kv: int, S: int, P: int, D: int, **more: Any) -> Problem:
        """The call of a training step: every token is a query and a key."""
        return cls(B=B, H=H, H_kv=H_kv, S=S, T=S, P=P, D=D, **more)

    @classmethod
    def decode(cls, B: int, H: int, H_kv: int, T: int, P: int, D: int, **more: Any) -> Problem:
        """The call of a decoding step: one new token attends to ``T`` keys, its own among them."""
        return cls(B=B, H=H, H_kv=H_kv, S=1, T=T, P=P, D=D, **more)

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.H // self.H_kv

    @property
    def dtype_name(self) -> str:
        return next((n for n, x in DTYPES.items() if x == self.dtype), str(self.dtype))

    @property
    def label(self) -> str:
        """``B8 H32/8 S128 P512 D64 fp32``, with ``T`` where it differs from ``S``."""
        keys = "" if self.T == self.S else f" T{self.T}"
        return f"B{self.B} H{self.H}/{self.H_kv} S{self.S}{keys} P{self.P} D{self.D} {self.dtype_name}"

    def without_prefix(self) -> Problem:
        """The same content with P = 0."""
        return replace(self, P=0)


def random_normal(
    problem: Problem, generator: torch.Generator, *shape: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Normally distributed numbers of this shape, on the problem's device and in its dtype unless another is given."""
    return torch.randn(*shape, generator=generator, device=problem.device, dtype=dtype or problem.dtype)


@dataclass(frozen=True)
class Leaves:
    """The inputs of a call and the gradient of its output; content is stored as ``[B, S, H, D]``, as in models."""

    q: Tensor  # [B, H, S, D]
    k: Tensor  # [B, H_kv, T, D]
    v: Tensor  # [B, H_kv, T, D]
    prefix_k: Tensor  # [H_kv, P, D]
    prefix_v: Tensor  # [H_kv, P, D]
    do: Tensor  # [B, H, S, D]

    @classmethod
    def random(cls, problem: Problem, seed: int = 0, requires_grad: bool | Collection[str] = False) -> Leaves:
        """Normally distributed inputs, equal for equal seed and device.

        Args:
            requires_grad: whether the inputs require gradients, or the names of those that do.
        """
        x, generator = problem, torch.Generator(problem.device).manual_seed(seed)

        def content(heads: int, length: int) -> Tensor:
            return random_normal(x, generator, x.B, length, heads, x.D).transpose(1, 2)

        q, k, v = content(x.H, x.S), content(x.H_kv, x.T), content(x.H_kv, x.T)
        prefix_k, prefix_v = (random_normal(x, generator, x.H_kv, x.P, x.D) for _ in range(2))
        leaves = cls(q, k, v, prefix_k, prefix_v, do=content(x.H, x.S))
        for name, leaf in leaves.inputs.items():
            leaf.requires_grad_(requires_grad if isinstance(requires_grad, bool) else name in requires_grad)
        return leaves

    @classmethod
    def of(cls, problem: Problem, mode: Mode, seed: int = 0) -> Leaves:
        """:meth:`random` ones that require the gradients that the mode asks for."""
        return cls.random(problem, seed, TRAINED[mode])

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The five arguments of the operator by name."""
        return {name: getattr(self, name) for name in INPUTS}

    def to(self, dtype: torch.dtype) -> Leaves:
        """New leaves with the same values in another dtype."""
        cast = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in self.inputs.items()}
        return Leaves(**cast, do=self.do.to(dtype))

    @cached_property
    def cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H_kv, P + T, D]`` of a cache that holds a copy of the prefix for every sample."""
        keys, values = self.concatenated()
        return keys.detach(), values.detach()

    def concatenated(self) -> tuple[Tensor, Tensor]:
        """Keys and values with the prefix copied in front of every sample, each ``[B, H_kv, P + T, D]``."""
        batch = self.k.shape[0]
        keys = torch.cat([self.prefix_k.expand(batch, -1, -1, -1), self.k], dim=2)
        return keys, torch.cat([self.prefix_v.expand(batch, -1, -1, -1), self.v], dim=2)
