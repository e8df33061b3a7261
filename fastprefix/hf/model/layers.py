"""Finds a model's attention layers in one forward: a layer that calls the attention interface can carry a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.attention import masks
from fastprefix.hf.attention.recording import AttentionCall
from fastprefix.hf.model import offload
from fastprefix.hf.model.dummy_inputs import dummy_inputs
from fastprefix.hf.model.probing import does_not_dispatch, first_calls, run, run_part
from fastprefix.prefixes.config import LayerShape, Part
from fastprefix.prefixes.head_shards import HeadShards

# Types in transformers' configs of layers without keys and values: they keep a state, or nothing.
WITHOUT_ATTENTION = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class AttentionStack:
    """Attention layers that run in one forward of one module."""

    part: nn.Module  # the model itself, its encoder or its decoder
    owner: nn.Module  # the module inside whose forward position ids and masks are made
    owner_arguments: tuple[str, ...]  # argument names of the owner's forward, without self
    main_input: str  # name of the argument that holds the content
    causal: bool
    layers: tuple[int, ...]  # indices of these layers among all of the model's
    has_position_bias: bool = False  # whether a bias by position is added to the content's scores (T5)
    extra_inputs: dict[str, Tensor] = field(default_factory=dict)  # needed by a dummy forward too
    ignores_position_ids: bool = False  # whether position ids are accepted but have no effect

    @property
    def takes_positions(self) -> bool:
        """Whether position ids move the content. Otherwise its positions are fixed (patches, convolutions, biases)."""
        return "position_ids" in self.owner_arguments and not self.ignores_position_ids

    @property
    def word_embeddings(self) -> nn.Module:
        """The embedding of the stack's token ids."""
        return self.part.get_input_embeddings()  # type: ignore[operator]

    def dummy_inputs(self, tokens: int = 2) -> dict[str, Tensor]:
        """Keyword arguments with which the stack's part can be run, the main input first."""
        return {**dummy_inputs(self.part, tokens), **self.extra_inputs}


@dataclass(frozen=True)
class Layers:
    """The attention layers of a model, in execution order."""

    modules: tuple[nn.Module, ...]
    shapes: tuple[LayerShape, ...]
    devices: tuple[torch.device, ...]
    parts: tuple[Part | None, ...]  # each layer's part of an encoder-decoder, else None
    stacks: tuple[AttentionStack, ...]  # an encoder and a decoder, or a single stack
    window: int | None  # the smallest sliding window or chunk of any layer, in tokens
    hybrid_layer_types: tuple[str, ...]  # of all layers of a hybrid model; else empty
    reuses_modules: bool  # one module serves several layers, which share a prefix (ALBERT, Zamba)
    num_heads: tuple[int, ...]  # each layer's query heads H
    kv_sources: tuple[int, ...]  # the layer whose keys and values each layer reads; an earlier one in Gemma 3n
    shards: HeadShards | None = None  # of a tensor-parallel model, whose shapes above are those of all processes

    @property
    def main(self) -> AttentionStack:
        """The decoder's stack, or the only one."""
        return self.stacks[-1]

    @property
    def prompted(self) -> AttentionStack:
        """The stack that reads a soft prompt in front of its rows: an encoder-decoder's encoder, or the only one."""
        return self.stacks[0]

    def batch_size(self, kwargs: dict[str, Any]) -> int:
        """Batch size B of a forward with these keyword arguments; raises ValueError where they hold no content."""
        names = [*(stack.main_input for stack in self.stacks), "inputs_embeds"]
        given = [kwargs[name] for name in names if kwargs.get(name) is not None]
        if not given:
            raise fail(names[-2], f"neither {names[-2]} nor inputs_embeds", "one of them")
        return int(given[0].shape[0])

    def without_positions(self) -> Layers:
        """A copy whose main stack is marked as ignoring position ids."""
        return replace(self, stacks=(*self.stacks[:-1], replace(self.main, ignores_position_ids=True)))


def find_layers(model: nn.Module) -> Layers:
    """Run a model once whose attention implementation is already fastprefix's.

    Raises:
        ValueError: not every attention layer calls the attention interface; the model's class is named.
    """
    inputs = dummy_inputs(model)
    with masks.recording_windows() as windows:
        calls = run_part(model, model, inputs)
    config: Any = getattr(model.config, "get_text_config", lambda: model.config)()
    types = tuple(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    # In a decoder whose config is an encoder-decoder's, num_hidden_layers counts the encoder's layers.
    decoder = getattr(config, "decoder_layers", None) if getattr(config, "is_decoder", False) else None
    expected = decoder or getattr(config, "num_hidden_layers", None)
    if expected is not None:
        expected -= sum(each in WITHOUT_ATTENTION for each in types)
        if len(calls) != expected:
            raise does_not_dispatch(
                model, f" once in each of its {expected} layers of attention, but {len(calls)} times"
            )
    firsts = first_calls(calls)
    found = make_layers([firsts], [None] * len(firsts), [make_stack(model, firsts, inputs)], windows)
    hybrid = any(each in WITHOUT_ATTENTION or each.startswith("hybrid") for each in types)
    return replace(
        found,
        hybrid_layer_types=types if hybrid else (),
        reuses_modules=len(firsts) < len(calls),
        kv_sources=_kv_sources(config, types, len(firsts)),
    )


def _kv_sources(config: Any, types: Sequence[str], count: int) -> tuple[int, ...]:
    """For each of ``count`` layers, the layer whose keys and values it reads; some models' last layers share them."""
    own = count - (getattr(config, "num_kv_shared_layers", None) or 0)
    return tuple(i if i < own else max(j for j in range(own) if types[j] == types[i]) for i in range(count))


def of_all_processes(model: nn.Module, layers: Layers, mesh: Any) -> Layers:
    """The layers of a tensor-parallel model, with the heads of all processes where each process has some of them.

    Raises:
        ValueError: a layer's queries are spread over processes and its keys are not, or the other way round.
    """
    config: Any = getattr(model.config, "get_text_config", lambda: model.config)()
    calls = {id(call.module): call for call in run(layers.main.owner, layers.main.dummy_inputs())}
    shapes, heads, sharded = [], [], []
    names = ("num_attention_heads", "num_key_value_heads")
    for i, (module, shape) in enumerate(zip(layers.modules, layers.shapes, strict=True)):
        q, k = (calls[id(module)].tensors[name] for name in "qk")
        of_queries, of_keys = (
            _is_spread(x, getattr(config, n, None), mesh) for x, n in zip((q, k), names, strict=True)
        )
        if of_queries != of_keys:
            which = ("queries", "keys") if of_queries else ("keys", "queries")
            got = f"{type(model).__name__}, whose tp_plan spreads the {which[0]} of layer {i} and not its {which[1]}"
            raise fail("model", got, "a plan that spreads both over processes, or neither")
        times = mesh.size() if of_keys else 1
        shapes.append(shape._replace(num_kv_heads=shape.num_kv_heads * times))
        heads.append(layers.num_heads[i] * times)
        sharded.append(of_keys)
    return replace(layers, shapes=tuple(shapes), num_heads=tuple(heads), shards=HeadShards(mesh, tuple(sharded)))


def _is_spread(x: Tensor, heads: Any, mesh: Any) -> bool:
    """Whether each process has its own heads in ``[B, heads, S, D]``; all have the same text."""
    if heads in (x.shape[1], x.shape[1] * mesh.size()):
        return bool(heads != x.shape[1])
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    torch.distributed.all_gather(found, x.contiguous(), group=mesh.get_group())
    return not all(torch.equal(found[0], other) for other in found)


def make_layers(
    calls: Sequence[Sequence[AttentionCall]],
    parts: Sequence[Part | None],
    stacks: Sequence[AttentionStack],
    windows: Sequence[int],
) -> Layers:
    """Make :class:`Layers` from the recorded attention calls of a model's stacks."""
    every = [call for some in calls for call in some]
    return Layers(
        modules=tuple(call.module for call in every),
        shapes=tuple(_shape(call) for call in every),
        devices=tuple(call.tensors["q"].device for call in every),
        parts=tuple(parts),
        stacks=tuple(stacks),
        window=min(windows, default=None),
        hybrid_layer_types=(),
        reuses_modules=False,
        num_heads=tuple(call.tensors["q"].shape[1] for call in every),
        kv_sources=tuple(range(len(every))),
    )


def make_stack(
    part: nn.Module,
    calls: Sequence[AttentionCall],
    inputs: dict[str, Tensor],
    first: int = 0,
    extra_inputs: dict[str, Tensor] | None = None,
) -> AttentionStack:
    """The stack whose layers a dummy forward ran.

    Args:
        part: the module that was run.
        calls: the layers' attention calls in that forward.
        inputs: the forward's inputs, the main input first.
        first: index of the stack's first layer among all of the model's.
        extra_inputs: inputs that later dummy forwards need besides the main input.
    """
    main_input = next(iter(inputs))
    owner = _owner(part, [call.module for call in calls], main_input)
    biases = (call.options.get("bias") for call in calls)
    return AttentionStack(
        part=part,
        owner=owner,
        owner_arguments=tuple(inspect.signature(owner.forward).parameters),
        main_input=main_input,
        causal=bool(calls[0].options["causal"]),
        layers=tuple(range(first, first + len(calls))),
        has_position_bias=any(x is not None and x.is_floating_point() for x in biases),
        extra_inputs=extra_inputs or {},
    )


def _shape(call: AttentionCall) -> LayerShape:
    key, value = call.tensors["k"], call.tensors["v"]
    return LayerShape(key.shape[1], key.shape[3], value.shape[3])


def _owner(model: nn.Module, attention: Sequence[nn.Module], main_input: str) -> nn.Module:
    """The innermost module around all attention layers that takes the main input; a head may call it directly."""
    found = model
    wanted = {id(m) for m in attention}
    for module in model.modules():
        if main_input in inspect.signature(module.forward).parameters and wanted <= {id(m) for m in module.modules()}:
            found = module
    return found


def key_values(model: nn.Module, ids: Tensor, layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """The model's own keys ``[H_kv, n, D]`` and values of token ids ``[n]``, at positions 0..n-1, layer by layer."""
    ids = ids.reshape(1, -1).to(offload.device(model))
    calls = {id(call.module): call.tensors for call in run(model, {"input_ids": ids})}
    found = [calls[id(module)] for module in layers]
    return [x["k"][0].clone() for x in found], [x["v"][0].clone() for x in found]
