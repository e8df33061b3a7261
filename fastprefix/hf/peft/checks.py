"""Checks that a PEFT adapter can be read, and repairs initial values with which it could not be trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.model import offload, probing
from fastprefix.hf.peft.adapters import MULTITASK, Adapters, kind, reads_cross
from fastprefix.hf.storage.decoder_slots import warn_of_biases
from fastprefix.hf.storage.peft_format import PREFIX_TYPES


def check(adapters: Adapters, name: str) -> None:
    """Raise ValueError unless the model's layers can read an adapter; also keep its parameters from being offloaded."""
    config, encoder = adapters.peft_model.peft_config[name], adapters.peft_model.prompt_encoder[name]
    if offload.meta_parameters(encoder):
        got = (
            f"adapter {name!r} on the meta device, where PEFT puts it when the base model's first weights are offloaded"
        )
        raise fail("peft_model", got, "a PEFT model that was made first, and its base model offloaded then")
    offload.remove_offload_hooks(encoder)
    adapters.installation.parameters.remember(name, encoder)
    if kind(config) == MULTITASK and adapters.two_stacks and encoder.num_transformer_submodules != 1:
        got = f"{encoder.num_transformer_submodules} of adapter {name!r}: PEFT trains it with a prompt in front of the "
        expected = "1 in the MultitaskPromptTuningConfig"
        raise fail("num_transformer_submodules", got + "decoder's rows too, and generates without that", expected)
    if kind(config) in PREFIX_TYPES:
        adapters.fit.check(config)
        adapters.read_cross_too(name)
        facts = adapters.installation.facts
        if adapters.two_stacks and not reads_cross(config) and facts.layers.main.has_position_bias:
            warn_of_biases(facts.model, stacklevel=4)


def check_output(installation: Installation) -> None:
    """Raise ValueError unless a model returns a ModelOutput, whose fields a soft prompt's outputs are put into."""
    with installation.forward.bypass(), probing.evaluating(installation.model):
        output = installation.model(**installation.facts.layers.main.dummy_inputs())
    if not hasattr(output, "get"):
        got = f"a {type(installation.model).__name__}, whose forward returns a {type(output).__name__}"
        raise fail("peft_model", got, "one that returns transformers' ModelOutput")


@torch.no_grad()
def break_symmetry(model: Any, name: str) -> None:
    """Replace PEFT's ``init_weights="zero"`` by N(0, 0.02^2): prefix tokens that start equal get equal gradients."""
    config, encoder = model.peft_config[name], model.prompt_encoder[name]
    if kind(config) != "PREFIX_TUNING" or config.prefix_projection or config.inference_mode:
        return
    weight = encoder.embedding.weight
    if weight.shape[0] > 1 and not weight.is_meta and not weight.any():
        weight.normal_(std=0.02)
        warnings.warn(
            "fastprefix: init_weights='zero' makes all prefix tokens equal, and equal they would stay; they start at "
            "N(0, 0.02^2) instead",
            stacklevel=3,
        )
