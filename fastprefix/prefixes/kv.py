"""The two parameterisations of a layer's prefix: keys and values as parameters, or as the output of an MLP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprefix.prefixes.config import LayerShape, Part
from fastprefix.prefixes.encoders.projection import Projection
from fastprefix.prefixes.gate import Gate
from fastprefix.prefixes.token_dropout import TokenDropout


class LayerKV(NamedTuple):
    """The prefix that one layer's attention reads in addition to its content."""

    k: Tensor  # [H_kv, P, D]; with ids a packed bank, where P is the sum of all prefixes' lengths
    v: Tensor  # [H_kv, P, D_v]
    ids: Tensor | None = None  # [B], the row's prefix in the bank, -1 = none
    lens: Tensor | None = None  # [N]
    gate: Tensor | None = None  # [H]; of a bank [N, H]; with ids [B, H]
    memory: Tensor | None = None  # [H, D, D_v], see memory.py
    bias: Tensor | None = None  # [H_kv, P], added to scores


def concatenate(parts: Sequence[LayerKV]) -> LayerKV:
    """One layer's keys, values and biases of several prefixes behind each other, without gates and memories."""
    k, v = torch.cat([part.k for part in parts], 1), torch.cat([part.v for part in parts], 1)
    if all(part.bias is None for part in parts):
        return LayerKV(k, v)
    biases = [part.k.new_zeros(part.k.shape[:2]) if part.bias is None else part.bias for part in parts]
    return LayerKV(k, v, bias=torch.cat(biases, 1))


class PrefixLayer(nn.Module, ABC):
    """One layer's prefix; calling it returns what the layer's attention reads.

    ``bias``: ``[H_kv, P]``, from which the trained bias starts; None for a prefix without one.
    """

    placement: Any = None  # in a tensor-parallel model, where the layer's heads are: Shard(0) or Replicate()

    def __init__(
        self, gate: Gate | None = None, dropout: TokenDropout | None = None, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.gate, self.dropout = gate, dropout
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @abstractmethod
    def key_values(self) -> tuple[Tensor, Tensor]:
        """``[H_kv, P, D]`` and ``[H_kv, P, D_v]``."""

    def extras(self) -> dict[str, Tensor]:
        """What is saved of the layer by name, besides keys and values that are its parameters or an MLP's output."""
        found: dict[str, Tensor] = {} if self.gate is None else {"gate": self.gate.weight}
        return found if self.bias is None else {**found, "bias": self.bias}

    def forward(self) -> LayerKV:
        """Keys, values and bias, without dropped tokens, and the gate if there is one."""
        k, v = self.key_values()
        bias: Tensor | None = self.bias
        gate = None if self.gate is None else self.gate()
        mesh = None
        if self.placement is not None:
            mesh = getattr(k, "device_mesh", None)
            k, v = self.own_heads(k), self.own_heads(v)
            bias = None if bias is None else self.own_heads(bias)
            gate = None if gate is None else self.own_heads(gate)
        if self.dropout is not None:
            k, v, bias = self.dropout(k, v, bias, mesh)
        return LayerKV(k, v, gate=gate, bias=bias)

    def own_heads(self, x: Tensor) -> Tensor:
        """The part of ``[H_kv, ...]`` or ``[H, ...]`` whose heads this process has (see head_shards.py)."""
        if self.placement is None or not hasattr(x, "redistribute"):
            return x
        own: Tensor = x.redistribute(placements=[self.placement]).to_local()
        return own


class DirectKV(PrefixLayer):
    """F frozen keys and values, then P - F trained ones ``[H_kv, P - F, D]``; ``key_values`` returns all P."""

    frozen_k: Tensor
    frozen_v: Tensor

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        num_frozen_tokens: int = 0,
        gate: Gate | None = None,
        dropout: TokenDropout | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(gate, dropout, bias)
        frozen = num_frozen_tokens
        self.num_frozen_tokens = frozen
        self.k = nn.Parameter(key[:, frozen:].detach().clone())
        self.v = nn.Parameter(value[:, frozen:].detach().clone())
        if frozen:
            self.register_buffer("frozen_k", key[:, :frozen].detach().clone())
            self.register_buffer("frozen_v", value[:, :frozen].detach().clone())

    def key_values(self) -> tuple[Tensor, Tensor]:
        """``[H_kv, P, D]`` and ``[H_kv, P, D_v]``."""
        if not self.num_frozen_tokens:
            return self.k, self.v
        return torch.cat([self.frozen_k, self.k], 1), torch.cat([self.frozen_v, self.v], 1)


class PrefixEncoder(nn.Module):
    """The MLP reparameterisation (Li & Liang 2021, section 4.3): ``[P, d] -> tanh -> every layer's keys and values``.

    All layers share the MLP. A layer can be computed alone, from parameters only, so that recomputation under gradient
    checkpointing is exact in both modes. In a forward without checkpointing, :meth:`share` computes all layers at once.
    """

    def __init__(self, num_virtual_tokens: int, token_dim: int, hidden: int, shapes: Sequence[LayerShape]) -> None:
        super().__init__()
        self.shapes = tuple(shapes)
        self.embedding = nn.Parameter(torch.randn(num_virtual_tokens, token_dim))
        self.down = Projection(token_dim, hidden)
        self.up = Projection(hidden, sum(s.numel for s in shapes))
        self._shared: list[tuple[Tensor, Tensor]] | None = None

    def share(self, parts: Sequence[Part | None] | None = None) -> None:
        """Compute every layer now; :meth:`layer` returns these until :meth:`unshare`. ``parts`` is not used here."""
        hidden = torch.tanh(self.down(self.embedding))
        flat = self.up(hidden).split([s.numel for s in self.shapes], dim=-1)
        self._shared = [self._split(x, s) for x, s in zip(flat, self.shapes, strict=True)]

    def unshare(self) -> None:
        """Drop the keys and values that :meth:`share` computed."""
        self._shared = None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]`` of the prefix's index-th layer."""
        if self._shared is not None:
            return self._shared[index]
        first = sum(s.numel for s in self.shapes[:index])
        rows = slice(first, first + self.shapes[index].numel)
        hidden = torch.tanh(self.down(self.embedding))
        flat = nn.functional.linear(hidden, self.up.weight[rows], self.up.bias[rows])
        return self._split(flat, self.shapes[index])

    @staticmethod
    def _split(flat: Tensor, shape: LayerShape) -> tuple[Tensor, Tensor]:
        heads, head_dim, value_dim = shape
        key, value = flat.split([heads * head_dim, heads * value_dim], dim=-1)  # [P, H_kv * D], [P, H_kv * D_v]
        return key.unflatten(-1, (heads, head_dim)).transpose(0, 1), value.unflatten(-1, (heads, value_dim)).transpose(
            0, 1
        )

    @torch.no_grad()
    def fit(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> float:
        """Fit the MLP's output to these keys and values, by least squares for its last layer; exact if P <= hidden.

        Returns:
            The remaining error, relative to the keys and values (Frobenius norms).
        """
        columns = [x.transpose(0, 1).flatten(1) for pair in zip(keys, values, strict=True) for x in pair]
        return self.up.fit(torch.tanh(self.down(self.embedding)), torch.cat(columns, dim=-1))  # [P, sum numel]


class PartEncoders(nn.ModuleDict):
    """An encoder-decoder's MLPs, one for each part (Li & Liang 2021 train three), with a PrefixEncoder's methods."""

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        hidden: int,
        shapes: Sequence[LayerShape],
        parts: Sequence[Part],
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.places: dict[Part, list[int]] = {
            part: [i for i, other in enumerate(parts) if other == part] for part in dict.fromkeys(parts)
        }
        for part, places in self.places.items():
            self[part] = PrefixEncoder(num_virtual_tokens, token_dim, hidden, [shapes[i] for i in places])

    def of(self, part: Part) -> PrefixEncoder:
        """One part's MLP."""
        encoder = self[part]
        assert isinstance(encoder, PrefixEncoder)
        return encoder

    def share(self, parts: Sequence[Part | None] | None = None) -> None:
        """Compute every layer of these parts (default: all parts) now, for :meth:`layer` until :meth:`unshare`."""
        for part in self.places:
            if parts is None or part in parts:
                self.of(part).share()

    def unshare(self) -> None:
        """Drop the keys and values that :meth:`share` computed."""
        for part in self.places:
            self.of(part).unshare()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]`` of the prefix's index-th layer."""
        part = self.parts[index]
        return self.of(part).layer(self.places[part].index(index))

    def fit(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> float:
        """Fit each part's MLP to these keys and values; returns the largest remaining relative error of a part."""
        return max(
            self.of(part).fit([keys[i] for i in places], [values[i] for i in places])
            for part, places in self.places.items()
        )


class ProjectedKV(PrefixLayer):
    """One layer of a shared :class:`PrefixEncoder`, which is registered elsewhere: a gate alone is a parameter here."""

    def __init__(
        self,
        encoder: PrefixEncoder | PartEncoders,
        index: int,
        gate: Gate | None = None,
        dropout: TokenDropout | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(gate, dropout, bias)
        self.index = index
        self._encoder = (encoder,)  # in a tuple, so that the encoder is not registered a second time

    def key_values(self) -> tuple[Tensor, Tensor]:
        """``[H_kv, P, D]`` and ``[H_kv, P, D_v]``."""
        return self._encoder[0].layer(self.index)
