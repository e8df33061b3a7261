"""Finds an encoder-decoder's three kinds of attention: encoder, decoder, and cross-attention (Li & Liang 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.attention import masks
from fastprefix.hf.model import layers as model_layers
from fastprefix.hf.model import probing
from fastprefix.hf.model.dummy_inputs import dummy_inputs
from fastprefix.hf.model.layers import Layers
from fastprefix.prefixes.config import Part

_TOKENS = 2  # decoder tokens in a dummy forward; attention over another number of keys is cross-attention


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def find_layers(model: Any) -> Layers:
    """Find the layers of an encoder-decoder by running its two stacks; ValueError names the class that misses one."""
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if not all(isinstance(x, nn.Module) and x is not model for x in (encoder, decoder)):
        raise fail("model", f"{type(model).__name__} without an encoder and a decoder of its own", "a model of both")
    source = dummy_inputs(encoder, tokens=_TOKENS + 3)
    with masks.recording_windows() as windows:
        calls = probing.first_calls(probing.run_part(model, encoder, source))
        states = _states(encoder, source)  # [1, T, d]
        target = {**dummy_inputs(decoder, tokens=_TOKENS), "encoder_hidden_states": states}
        decoder_calls = probing.first_calls(probing.run_part(model, decoder, target))
    cross = [call.tensors["k"].shape[2] != _TOKENS for call in decoder_calls]
    _count(model, len(calls), len(cross) - sum(cross), sum(cross))
    parts: list[Part] = ["encoder"] * len(calls)
    parts += ["cross" if over_encoder else "decoder" for over_encoder in cross]
    few = {"encoder_hidden_states": states[:, : _TOKENS + 3]}
    stacks = (
        model_layers.make_stack(encoder, calls, source),
        model_layers.make_stack(decoder, decoder_calls, target, first=len(calls), extra_inputs=few),
    )
    return model_layers.make_layers([calls, decoder_calls], parts, stacks, windows)


def _states(encoder: Any, source: dict[str, Tensor]) -> Tensor:
    with probing.evaluating(encoder):
        states = encoder(**source)[0]
    assert isinstance(states, Tensor)
    return states


def _count(model: Any, encoders: int, decoders: int, cross: int) -> None:
    """Raise ValueError unless every attention of every layer called the attention interface."""
    want_encoders = _field(model.config, "encoder", "encoder_layers", "num_layers", "num_hidden_layers")
    want = _field(model.config, "decoder", "decoder_layers", "num_decoder_layers", "num_hidden_layers")
    if (encoders, decoders, cross) != (want_encoders, want, want):
        got = (
            f" in all of {want_encoders} encoder and {want} decoder layers, only in {encoders}, {decoders} and {cross}"
        )
        raise probing.does_not_dispatch(model, got)


def _field(config: Any, part: str, *names: str) -> int | None:
    """The first of these integer fields that is set, in the part's own config if it has one, else in ``config``."""
    holders = (getattr(config, part, None), config)
    values = [getattr(holder, name, None) for holder in holders for name in names]
    return next((value for value in values if isinstance(value, int)), None)


def key_values(model: Any, layers: Layers, ids: Tensor, wanted: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The model's own keys ``[H_kv, n, D]`` and values of a text ``[n]``, read by both encoder and decoder.

    ``wanted``: indices of the layers.

    Raises:
        ValueError: a wanted layer does not read tokens.
    """
    encoder, decoder = layers.stacks
    tokens = {"input_ids": ids.reshape(1, -1).to(layers.devices[0])}
    source = tokens if encoder.main_input == "input_ids" else encoder.dummy_inputs()
    if source is not tokens and any(layers.parts[i] != "decoder" for i in wanted):
        got = f"tokens for {type(model).__name__}, whose encoder reads {encoder.main_input}"
        raise fail("init", got, "parts=('decoder',), or fastprefix.init.normal or kv")
    calls = probing.run(encoder.owner, source)
    states = _states(encoder.owner, source)
    calls += probing.run(decoder.owner, {**tokens, "encoder_hidden_states": states})
    found = {id(call.module): call.tensors for call in calls}
    picked = [found[id(layers.modules[i])] for i in wanted]
    return [x["k"][0].clone() for x in picked], [x["v"][0].clone() for x in picked]
