"""``Geometry``: the sizes of a served model that a prefix has to fit, and its share on each device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastprefix.prefixes.config import LayerShape

# Keys [H_kv, P, D] and a number of positions -> the keys as if they stood so many positions later.
Rotate = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Geometry:
    """What the front end knows of the model without loading it."""

    model: str  # its folder or name
    layers: int
    num_kv_heads: int  # H_kv of the whole model
    head_dim: int  # D
    hidden_size: int  # d
    dtype: torch.dtype
    rotate: Rotate | None = None
    no_rotation: str = ""  # why rotate is None

    @property
    def shapes(self) -> list[LayerShape]:
        """Each layer's shape."""
        return [LayerShape(self.num_kv_heads, self.head_dim, self.head_dim)] * self.layers


def heads_of(rank: int, size: int, num_kv_heads: int) -> slice:
    """The key/value heads that tensor-parallel rank ``rank`` of ``size`` holds.

    With more devices than heads, neighbouring devices hold the same head, as in vLLM.

    Raises:
        ValueError: neither number divides the other.
    """
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(f"tensor_parallel_size: got {size}, expected a divisor or a multiple of {num_kv_heads} heads")
    if num_kv_heads >= size:
        each = num_kv_heads // size
        return slice(rank * each, (rank + 1) * each)
    first = rank // (size // num_kv_heads)
    return slice(first, first + 1)


def rotation(inv_freq: Tensor) -> Rotate:
    """A function that moves rotary keys ``[H_kv, P, D]`` on by some positions.

    Rotary embeddings (Su et al. 2021, arXiv:2104.09864) turn the pair ``(x[i], x[i + R/2])`` of a key's first R numbers
    by the angle ``position * inv_freq[i]``; angles add up. The rest of the key, ``D - R`` numbers, has no position.

    Args:
        inv_freq: ``[R/2]``, the same for all lengths of a text.
    """
    half = len(inv_freq)

    def rotate(keys: Tensor, positions: int) -> Tensor:
        angles = positions * inv_freq.double()
        cos, sin = angles.cos(), angles.sin()  # [R/2]
        x = keys.double()
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(keys.dtype)

    return rotate
