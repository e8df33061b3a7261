"""Checks whether a model can read a prompt - soft, or of tokens - in front of its rows."""

from __future__ import annotations

from typing import Any

from fastprefix.errors import fail
from fastprefix.hf.model.facts import ModelFacts
from fastprefix.prefixes.prompt import Place


def check_tokens(model: Any) -> None:
    """Raise ValueError unless a model reads token ids, which prompts need."""
    _check_main_input(model)
    if getattr(model.config, "is_encoder_decoder", False):
        expected = "a decoder or an encoder (an encoder-decoder: attach with a PromptConfig or a PrefixConfig)"
        raise fail("model", f"{type(model).__name__}, an encoder-decoder", expected)


def _check_main_input(model: Any) -> None:
    if model.main_input_name != "input_ids":
        got = f"{type(model).__name__}, which reads {model.main_input_name}"
        raise fail("model", got, "a model of input_ids: prompts are tokens")


def check_prompts(facts: ModelFacts) -> None:
    """Raise ValueError unless a soft prompt can stand in front of a model's rows (an encoder-decoder's encoder's)."""
    _check_main_input(facts.model)
    check_images(facts)
    if facts.layers.prompted.causal:  # elsewhere the prompt runs with the rows, as tokens of theirs
        check_rows_behind(facts)


def check_rows_behind(facts: ModelFacts) -> None:
    """Raise ValueError unless a model's rows can stand behind keys and values of their own in every layer."""
    if facts.layers.reuses_modules:
        got = f"{type(facts.model).__name__}, whose layers share an attention module"
        raise fail("model", got, "one module a layer: a prompt has keys of its own in each")
    if facts.layers.hybrid_layer_types:
        got = f"{type(facts.model).__name__}, some of whose layers have no attention"
        raise fail("model", got, "attention in every layer: others would not see the prompt")
    if not facts.layers.main.takes_positions:
        got = f"{type(facts.model).__name__}, whose forward takes no position_ids"
        if facts.layers.main.ignores_position_ids:
            got = f"{type(facts.model).__name__}, whose position_ids move nothing"
        raise fail("model", got, "one that does: rows are moved behind a prompt")


def check_place(facts: ModelFacts, place: Place) -> None:
    """Raise ValueError unless a soft prompt can stand at this place in the rows of a model that reads prompts."""
    if place != "before" and not facts.layers.prompted.causal:
        got = f"{place!r} in {type(facts.model).__name__}, which reads its text in both directions"
        raise fail("place", got, "'before': only what is generated or read from left to right has text after a prompt")


def check_images(facts: ModelFacts) -> None:
    """Raise ValueError for a model whose image tokens have fixed positions, which must not be shifted by a prefix.

    HunYuan-VL numbers an image's tokens by column, row and image, from 0 wherever the image is in the text; the
    position ids do not tell which tokens belong to an image.
    """
    name = type(facts.layers.main.owner).__name__
    if name.startswith("HunYuanVL"):
        got = f"{type(facts.model).__name__}, whose images have absolute positions beside a text that is moved"
        raise fail("model", got, "a PrefixConfig with position_offset='none', which moves nothing")
