"""Find a model's attention layers by running one of its forwards: what dispatches is what can carry a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.attention import method_overrides as bypassing
from fastprefix.hf.attention.function import AttentionCall, masks, recording
from fastprefix.hf.model import offload as offloaded
from fastprefix.hf.model import wrappers
from fastprefix.hf.model.dummy_inputs import example
from fastprefix.prefixes.config import LayerShape, Part
from fastprefix.validation import fail

# What transformers' configs call layers without keys and values: they keep a state, or nothing.
WITHOUT_ATTENTION = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class Stack:
    """Attention layers that run in one forward of one module."""

    part: nn.Module  # of the model: itself, its encoder or its decoder
    owner: nn.Module  # the module inside whose forward makes positions and masks
    owner_arguments: tuple[str, ...]  # of its forward, without self
    main_input: str  # the argument with the rows' content
    causal: bool
    layers: tuple[int, ...]  # which of the model's
    biased: bool = False  # whether biases by position are added to scores of content (T5)
    beside: dict[str, Tensor] = field(default_factory=dict)  # what an example forward needs beside its main input
    passes_positions_by: bool = False  # whether position ids are taken and change nothing

    @property
    def takes_positions(self) -> bool:
        """Whether content can be moved; elsewhere its positions belong to it (patches, convolutions, biases)."""
        return "position_ids" in self.owner_arguments and not self.passes_positions_by

    def example(self, tokens: int = 2) -> dict[str, Tensor]:
        """What its forward runs on, its main input first."""
        return {**example(self.part, tokens), **self.beside}


@dataclass(frozen=True)
class Layers:
    """The attention layers of a model, in execution order."""

    modules: tuple[nn.Module, ...]
    shapes: tuple[LayerShape, ...]
    devices: tuple[torch.device, ...]
    parts: tuple[Part | None, ...]  # of an encoder-decoder
    stacks: tuple[Stack, ...]  # an encoder's and a decoder's, or one
    window: int | None  # the smallest of its sliding windows or chunks, in tokens
    kinds: tuple[str, ...]  # of a hybrid's layers, those without attention among them; empty elsewhere
    again: bool  # whether one attention module runs as several layers, which then have one prefix (ALBERT, Zamba)
    sources: tuple[int, ...]  # the layer whose keys and values each layer reads: its own, or one before it (Gemma 3n)

    @property
    def main(self) -> Stack:
        """The only stack, or the decoder's."""
        return self.stacks[-1]


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a transformers model of a kind that can carry a prefix."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise fail("model", type(model).__name__, f"a transformers PreTrainedModel{wrappers.hint(model)}")
    name = type(model).__name__
    if absent := offloaded.missing(model):
        got = f"{name} with parameters on the meta device ({absent[0]})"
        raise fail("model", got, "a model with its weights in memory, or where a hook of accelerate's finds them")
    if not model._can_set_attn_implementation() and not bypassing.leads(model):
        raise does_not_dispatch(model)


def does_not_dispatch(model: nn.Module, detail: str = "") -> ValueError:
    """What is raised for a model that cannot carry a prefix, naming its class."""
    return fail(
        "model",
        f"{type(model).__name__}, whose attention does not go through transformers' attention interface{detail}",
        "a model whose every attention layer does: elsewhere a prefix would be silently ignored",
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block, and what is compiled (``module.compile()``) as it was written."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[AttentionCall]:
    """Every layer's attention call in a forward of these inputs, in eval mode without gradients."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with evaluating(model), recording() as calls:
        model(**inputs, **options)
    return calls


def run_part(model: nn.Module, part: nn.Module, inputs: dict[str, Tensor]) -> list[AttentionCall]:
    """The calls of a model's part; raises ValueError naming the model's class where there are none."""
    try:
        calls = run(part, inputs)
    except KeyError as error:  # models that look their classes up by the implementation's name
        raise does_not_dispatch(model, f" ({error})") from error
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        got = f"{type(model).__name__}, which does not run on {' and '.join(inputs)} alone ({error})"
        raise fail("model", got, "a model that does, or the part of it that is to read the prefix") from error
    if not calls:
        raise does_not_dispatch(model)
    return calls


def find_layers(model: nn.Module) -> Layers:
    """Probe a model whose attention implementation is fastprefix's already; raises ValueError naming its class."""
    inputs = example(model)
    with masks.windows() as windows:
        calls = run_part(model, model, inputs)
    config: Any = getattr(model.config, "get_text_config", lambda: model.config)()
    kinds = tuple(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    # A decoder's config that an encoder-decoder shares names the encoder's layers so.
    decoder = getattr(config, "decoder_layers", None) if getattr(config, "is_decoder", False) else None
    expected = decoder or getattr(config, "num_hidden_layers", None)
    if expected is not None:
        expected -= sum(kind in WITHOUT_ATTENTION for kind in kinds)
        if len(calls) != expected:
            raise does_not_dispatch(
                model, f" once in each of its {expected} layers of attention, but {len(calls)} times"
            )
    modules = once(calls)
    found = layers([modules], [None] * len(modules), [stack(model, modules, inputs)], windows)
    mixed = any(kind in WITHOUT_ATTENTION or kind.startswith("hybrid") for kind in kinds)
    return replace(
        found,
        kinds=kinds if mixed else (),
        again=len(modules) < len(calls),
        sources=_sources(config, kinds, len(modules)),
    )


def _sources(config: Any, kinds: Sequence[str], count: int) -> tuple[int, ...]:
    """The layer whose keys and values each of ``count`` layers reads; the last ones of some models share them."""
    own = count - (getattr(config, "num_kv_shared_layers", None) or 0)
    return tuple(i if i < own else max(j for j in range(own) if kinds[j] == kinds[i]) for i in range(count))


def without_positions(layers: Layers) -> Layers:
    """The same, of a model whose position ids move nothing."""
    return replace(layers, stacks=(*layers.stacks[:-1], replace(layers.main, passes_positions_by=True)))


def once(calls: Sequence[AttentionCall]) -> list[AttentionCall]:
    """The first call of each module."""
    found: dict[int, AttentionCall] = {}
    for call in calls:
        found.setdefault(id(call.module), call)
    return list(found.values())


def layers(
    calls: Sequence[Sequence[AttentionCall]],
    parts: Sequence[Part | None],
    stacks: Sequence[Stack],
    windows: Sequence[int],
) -> Layers:
    """What the calls of a model's stacks say about its layers."""
    every = [call for some in calls for call in some]
    return Layers(
        modules=tuple(call.module for call in every),
        shapes=tuple(_shape(call) for call in every),
        devices=tuple(call.tensors["q"].device for call in every),
        parts=tuple(parts),
        stacks=tuple(stacks),
        window=min(windows, default=None),
        kinds=(),
        again=False,
        sources=tuple(range(len(every))),
    )


def stack(
    part: nn.Module,
    calls: Sequence[AttentionCall],
    inputs: dict[str, Tensor],
    first: int = 0,
    beside: dict[str, Tensor] | None = None,
) -> Stack:
    """The stack that a forward of some example inputs, the main one first, ran through; ``first``: its first layer."""
    main_input = next(iter(inputs))
    owner = _owner(part, [call.module for call in calls], main_input)
    return Stack(
        part=part,
        owner=owner,
        owner_arguments=tuple(inspect.signature(owner.forward).parameters),
        main_input=main_input,
        causal=bool(calls[0].options["causal"]),
        layers=tuple(range(first, first + len(calls))),
        biased=any(x is not None and x.is_floating_point() for x in (call.options.get("bias") for call in calls)),
        beside=beside or {},
    )


def _shape(call: AttentionCall) -> LayerShape:
    key, value = call.tensors["k"], call.tensors["v"]
    return LayerShape(key.shape[1], key.shape[3], value.shape[3])


def _owner(model: nn.Module, attention: Sequence[nn.Module], main_input: str) -> nn.Module:
    """The innermost module around all attention layers that takes the main input: heads may call it directly."""
    found = model
    wanted = {id(m) for m in attention}
    for module in model.modules():
        if main_input in inspect.signature(module.forward).parameters and wanted <= {id(m) for m in module.modules()}:
            found = module
    return found


def key_values(model: nn.Module, ids: Tensor, layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """The model's own keys ``[H_kv, n, D]`` and values of token ids ``[n]``, at positions 0..n-1, layer by layer."""
    ids = ids.reshape(1, -1).to(offloaded.device(model))
    calls = {id(call.module): call.tensors for call in run(model, {"input_ids": ids})}
    found = [calls[id(module)] for module in layers]
    return [x["k"][0].clone() for x in found], [x["v"][0].clone() for x in found]
