"""``Prefix``, the trainable module that ``attach`` returns, and ``LayerSlot``, its place in an attention module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.prefixes.config import LayerShape, Part, PrefixConfig
from fastprefix.prefixes.gate import Gate
from fastprefix.prefixes.kv import DirectKV, LayerKV, PartEncoders, PrefixEncoder, PrefixLayer, ProjectedKV
from fastprefix.prefixes.llama_adapter import LlamaAdapterConfig
from fastprefix.prefixes.memory import PrefixMemoryConfig
from fastprefix.prefixes.modules import Modules
from fastprefix.prefixes.token_dropout import TokenDropout

LayerConfig = PrefixConfig | LlamaAdapterConfig | PrefixMemoryConfig  # of what is trained in attention layers


class Prefix(nn.Module):
    """All layers of one prefix.

    The prefix's layers are also children of the model's attention modules (and its encoder a child of the model), so
    that optimisers, FSDP and checkpoints find the parameters in the model. This module gives access to all of them.

    Attributes:
        config: the :class:`PrefixConfig` or :class:`LlamaAdapterConfig` that the prefix was made from.
        layer_indices: indices of the attention layers that have the prefix, in execution order.
        parts: each layer's part of an encoder-decoder (``"encoder"``, ``"decoder"`` or ``"cross"``), else None.
        sources: for each of these layers, the layer whose content keys and values it reads: itself, unless shared.
        shapes: the :class:`LayerShape` of each of these layers.
        num_heads: the number of query heads H of each of these layers.
        encoder: the MLP (in an encoder-decoder one for each part), or None when keys and values are trained directly.
        modules_to_save: the prefix's copies of the modules that ``config.modules_to_save`` names.
    """

    def __init__(
        self,
        config: LayerConfig,
        shapes: Sequence[LayerShape],
        layer_indices: Sequence[int],
        parts: Sequence[Part | None] | None = None,
        sources: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shapes = tuple(shapes)
        self.num_heads = tuple(shape.num_kv_heads for shape in self.shapes) if num_heads is None else tuple(num_heads)
        self.layer_indices = tuple(layer_indices)
        self.parts: tuple[Part | None, ...] = (None,) * len(self.shapes) if parts is None else tuple(parts)
        self.sources = tuple(layer_indices if sources is None else sources)
        self.encoder: PrefixEncoder | PartEncoders | None = None
        self.layers = nn.ModuleList()
        self.modules_to_save = Modules()

    @property
    def num_virtual_tokens(self) -> int:
        """Prefix tokens P."""
        return self.config.num_virtual_tokens

    @property
    def offset(self) -> int:
        """By how many positions the content after the prefix is shifted."""
        return self.num_virtual_tokens if self.config.position_offset == "after_prefix" else 0

    @property
    def kind(self) -> str:
        """The prefix in words, for messages."""
        if isinstance(self.config, LlamaAdapterConfig):
            return "LLaMA-Adapter"
        if isinstance(self.config, PrefixMemoryConfig):
            return "prefix memory"
        gated = "" if self.config.gate is None else "gated "
        return f"{gated}prefix" if self.encoder is None else f"{gated}prefix through an MLP"

    @property
    def has_bias(self) -> bool:
        """Whether a bias is trained that is added to the scores of its tokens."""
        return isinstance(self.config, PrefixConfig) and self.config.prefix_bias

    @property
    def is_added(self) -> bool:
        """Whether the output of the prefix is added to the content's, instead of one softmax over both."""
        return self.config.gate is not None or isinstance(self.config, PrefixMemoryConfig)

    def devices(self) -> list[torch.device]:
        """Each layer's device."""
        return [layer.key_values()[0].device for layer in self._layers()]

    def set_direct(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> None:
        """Make these keys ``[H_kv, P, D]`` and values the parameters, without an MLP. Gates stay as they are.

        ``biases``: ``[H_kv, P]`` of each layer, for a prefix with ``prefix_bias``; None leaves them as they are.
        """
        self.check(keys, values)
        devices = [k.device for k in keys]
        frozen, gates = self.config.num_frozen_tokens, self.gates(devices)
        starts = self._biases(devices, biases)
        self.encoder = None
        layers = zip(keys, values, gates, starts, strict=True)
        self.layers = nn.ModuleList(DirectKV(k, v, frozen, gate, self._dropout(), b) for k, v, gate, b in layers)

    def set_encoder(
        self,
        encoder: PrefixEncoder | PartEncoders,
        devices: Sequence[torch.device],
        biases: Sequence[Tensor] | None = None,
    ) -> None:
        """Make an MLP's output the keys and values; ``devices``: of the layers, on which their gates and biases lie."""
        starts = self._biases(devices, biases)
        gates = zip(self.gates(devices), starts, strict=True)
        self.encoder = encoder
        self.layers = nn.ModuleList(
            ProjectedKV(encoder, i, gate, self._dropout(), b) for i, (gate, b) in enumerate(gates)
        )

    def _biases(self, devices: Sequence[torch.device], given: Sequence[Tensor] | None) -> list[Tensor | None]:
        """Where each layer's bias starts: at what is given, what there is, or 0; None for a prefix without biases."""
        if not self.has_bias:
            return [None] * len(self.shapes)
        found = given or [layer.bias for layer in self._layers() if layer.bias is not None]
        tokens = self.num_virtual_tokens
        found = found or [torch.zeros(shape.num_kv_heads, tokens) for shape in self.shapes]
        for i, (x, shape) in enumerate(zip(found, self.shapes, strict=True)):
            if tuple(x.shape) != (shape.num_kv_heads, tokens):
                want = f"[H_kv, P] = {[shape.num_kv_heads, tokens]} in layer {self.layer_indices[i]}"
                raise fail("biases", f"shape {list(x.shape)}", want)
        return [x.detach().float().to(device) for x, device in zip(found, devices, strict=True)]

    def gates(self, devices: Sequence[torch.device]) -> list[Gate | None]:
        """Each layer's gate, a new one on the layer's device where there is none yet; None without gates."""
        if self.config.gate is None:
            return [None] * len(self.shapes)
        found = [layer.gate for layer in self._layers()] or [Gate(self.config.gate, heads) for heads in self.num_heads]
        return [None if gate is None else gate.to(device) for gate, device in zip(found, devices, strict=True)]

    def _dropout(self) -> TokenDropout | None:
        config = self.config
        p = config.dropout if isinstance(config, PrefixConfig) else 0.0
        return TokenDropout(p, config.num_frozen_tokens).train(self.training) if p else None

    def _layers(self) -> list[PrefixLayer]:
        return list(self.layers)  # type: ignore[arg-type]  # a ModuleList does not know of which modules

    def key_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys ``[H_kv, P, D]`` and values ``[H_kv, P, D_v]`` of each layer, with their gradients."""
        return [layer.key_values() for layer in self._layers()]

    def biases(self) -> tuple[Tensor, ...] | None:
        """Each layer's bias ``[H_kv, P]``; None for a prefix without."""
        found = tuple(layer.bias for layer in self._layers() if layer.bias is not None)
        return found if self.has_bias else None

    def read(self) -> list[LayerKV]:
        """What each layer's attention reads."""
        return [layer() for layer in self.layers]

    def check(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Raise ValueError unless there are P keys and values of the right shape for every layer."""
        if len(keys) != len(self.shapes) or len(values) != len(self.shapes):
            raise fail(
                "init", f"{len(keys)} keys and {len(values)} values", f"one of each for {len(self.shapes)} layers"
            )
        P = self.num_virtual_tokens
        for i, (k, v, s) in enumerate(zip(keys, values, self.shapes, strict=True)):
            for name, x, dim in (("keys", k, s.head_dim), ("values", v, s.value_dim)):
                if tuple(x.shape) != (s.num_kv_heads, P, dim):
                    want = f"[H_kv, P, D] = {[s.num_kv_heads, P, dim]} in layer {self.layer_indices[i]}"
                    raise fail(name, f"shape {list(x.shape)}", want)


class LayerSlot(nn.Module):
    """A child of an attention module, which holds the layer's prefixes by name; at most one of them is active.

    During a forward ``override`` may replace the active prefix by other keys and values: a bank, or those that the
    model computed from a prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = nn.ModuleDict()
        self.active: str | None = None
        self.override: LayerKV | None = None
        self.is_overridden = False  # whether ``override`` (even if None) replaces the active prefix
        self.packed: Any = None  # while prompts and rows run as one text: its PackedPrompts
        self.capturing = False
        self.projecting = False  # whether the module runs for its keys and values alone, see KeyValueProjection
        self.captured: tuple[Tensor, Tensor] | None = None  # the content's [B, H_kv, T, D], [B, H_kv, T, D_v]
        self.fallback_attention: str | None = None  # the content's implementation, with a gated prompt
        self.keeps_query = False
        self.query: Tensor | None = None  # [B, H, S, D]
        self.query_factor: Tensor | None = None  # [B or 1, 1, S, 1], see hf/attention/query_scaling.py
        self.ran = False  # whether the attention function was called, for the check after the first forward

    def set_override(self, kv: LayerKV | None) -> None:
        """Read these keys and values (None: no prefix) instead of the active prefix."""
        self._set_override(kv, True)

    def clear_override(self) -> None:
        """Read the active prefix again."""
        self._set_override(None, False)

    def _set_override(self, kv: LayerKV | None, is_overridden: bool) -> None:
        # Every layer's is set in every forward, and a module's own way looks for parameters and modules first.
        object.__setattr__(self, "override", kv)
        object.__setattr__(self, "is_overridden", is_overridden)

    def forward(self) -> LayerKV | None:
        """The keys and values that this layer reads; None where it has no prefix."""
        if self.is_overridden:
            return self.override
        if self.active is None:
            return None
        # This runs in every layer for every token, and a module's own attributes are found faster than its children.
        layer = self._modules["prefixes"]._modules.get(self.active)  # type: ignore[union-attr]
        if layer is None:
            return None
        kv: LayerKV = layer() if is_hooked(layer) else layer.forward()
        return kv


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, as FSDP's and pruning's. Without any its ``forward`` is called, which is faster."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )
