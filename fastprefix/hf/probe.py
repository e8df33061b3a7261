"""Find a model's attention layers by running one of its forwards: what dispatches is what can carry a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf import masks
from fastprefix.hf.attention import AttentionCall, recording
from fastprefix.hf.example import example
from fastprefix.prefixes.config import LayerShape
from fastprefix.validation import fail


@dataclass(frozen=True)
class Layers:
    """The attention layers of a model, in execution order."""

    modules: tuple[nn.Module, ...]
    shapes: tuple[LayerShape, ...]
    devices: tuple[torch.device, ...]
    causal: bool
    owner: nn.Module  # the module whose forward makes positions and masks
    owner_arguments: tuple[str, ...]  # of its forward, without self
    main_input: str  # the argument with the rows' content
    window: int | None  # the smallest of its sliding windows or chunks, in tokens

    @property
    def takes_positions(self) -> bool:
        """Whether content can be moved; elsewhere its positions belong to it (patches, convolutions, biases)."""
        return "position_ids" in self.owner_arguments


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a transformers model of a kind that can carry a prefix."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        hint = "; a PeftModel holds one: model.get_base_model()" if hasattr(model, "get_base_model") else ""
        raise fail("model", type(model).__name__, f"a transformers PreTrainedModel{hint}")
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise fail("model", f"{name}, an encoder-decoder", "a decoder or an encoder")
    if any(p.device.type == "meta" for p in model.parameters()):
        raise fail("model", f"{name} with parameters on the meta device", "a model with its weights in memory")
    if not model._can_set_attn_implementation():
        raise does_not_dispatch(model)


def does_not_dispatch(model: nn.Module, detail: str = "") -> ValueError:
    """What is raised for a model that cannot carry a prefix, naming its class."""
    return fail(
        "model",
        f"{type(model).__name__}, whose attention does not go through transformers' attention interface{detail}",
        "a model whose every attention layer does: elsewhere a prefix would be silently ignored",
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[AttentionCall]:
    """Every layer's attention call in a forward of these inputs, in eval mode without gradients."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with _evaluating(model), recording() as calls:
        model(**inputs, **options)
    return calls


def find_layers(model: nn.Module) -> Layers:
    """Probe a model whose attention implementation is fastprefix's already; raises ValueError naming its class."""
    inputs = example(model)
    (main_input,) = inputs
    try:
        with masks.windows() as windows:
            calls = run(model, inputs)
    except KeyError as error:  # models that look their classes up by the implementation's name
        raise does_not_dispatch(model, f" ({error})") from error
    except (AttributeError, TypeError) as error:
        got = f"{type(model).__name__}, which does not run on {main_input} alone ({error})"
        raise fail("model", got, "a model that does, or the part of it that is to read the prefix") from error
    if not calls:
        raise does_not_dispatch(model)
    modules = [call.module for call in calls]
    if len({id(m) for m in modules}) != len(modules):
        raise fail("model", f"{type(model).__name__}, whose layers share an attention module", "one module per layer")
    config: Any = getattr(model.config, "get_text_config", lambda: model.config)()
    expected = getattr(config, "num_hidden_layers", None)
    if expected is not None and len(modules) != expected:
        raise does_not_dispatch(model, f" in {expected - len(modules)} of {expected} layers")
    owner = _owner(model, modules, main_input)
    return Layers(
        modules=tuple(modules),
        shapes=tuple(_shape(call) for call in calls),
        devices=tuple(call.tensors["q"].device for call in calls),
        causal=bool(calls[0].options["causal"]),
        owner=owner,
        owner_arguments=tuple(inspect.signature(owner.forward).parameters),
        main_input=main_input,
        window=min(windows, default=None),
    )


def sees_the_future(model: nn.Module, owner: nn.Module) -> bool:
    """Whether a model's first tokens, patches or frames depend on the last number of its input."""
    # Not token 0, which is often padding and embedded as nothing.
    inputs, hidden = example(model, tokens=3), []
    (content,) = inputs.values()
    with _evaluating(owner):
        for last in (1, 2):
            content.view(-1)[-1] = last
            hidden.append(owner(**inputs)[0][:, :-1])
    before, after = hidden
    # Other rows of a product may round differently; a mask that lets the future in changes more than that.
    tiny = 64 * torch.finfo(before.dtype).eps
    return not torch.allclose(before, after, rtol=tiny, atol=tiny * before.abs().max().item())


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
    ids = ids.reshape(1, -1).to(next(model.parameters()).device)
    calls = {id(call.module): call.tensors for call in run(model, {"input_ids": ids})}
    found = [calls[id(module)] for module in layers]
    return [x["k"][0].clone() for x in found], [x["v"][0].clone() for x in found]
