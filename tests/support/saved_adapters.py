"""Adapters of every kind in a folder, a model's state and a prefix's numbers: for tests of what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init
from tests.support.tiny_models import tiny_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN, ENCODER = "fastprefix_config.json", "prefix_encoder.safetensors"
P = 3
KINDS: dict[str, Callable[[], PrefixConfig | PromptConfig]] = {
    "direct": lambda: PrefixConfig(P, init=init.normal(0.5)),
    "projected": lambda: PrefixConfig(P, prefix_projection=True, encoder_hidden_size=5),
    "frozen": lambda: PrefixConfig(P, num_frozen_tokens=1),
    "layers": lambda: PrefixConfig(P, layers=[1]),
    "prompt": lambda: PromptConfig(P),
    "encoded_prompt": lambda: PromptConfig(P, encoder="lstm", encoder_hidden_size=5, encoder_num_layers=1),
}


def saved(folder: Path, kind: str, seed: int = 1) -> dict[str, Tensor]:
    """Save an adapter of a kind, the same one for a seed; its numbers."""
    model = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prefix = fastprefix.attach(model, KINDS[kind]())
    fastprefix.save(model, folder)
    return numbers(prefix)


def numbers(prefix: Any) -> dict[str, Tensor]:
    """Copies of everything that a prefix holds."""
    return {name: x.detach().clone() for name, x in prefix.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two prefixes hold the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def edit_json(path: Path, **fields: Any) -> None:
    """Other values in a JSON file, given as they are or as JSON text behind ``json:``."""
    data = {**json.loads(path.read_text()), **fields}
    text = json.dumps(data)
    for name, value in fields.items():
        if isinstance(value, str) and value.startswith("json:"):
            text = text.replace(f"{json.dumps(name)}: {json.dumps(value)}", f"{json.dumps(name)}: {value[5:]}")
    path.write_text(text)


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Other tensors in a safetensors file; our configuration keeps the digest of those before."""
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def state(model: Any) -> tuple[Any, ...]:
    """What attaching changes and detaching restores."""
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]
    frozen = [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    own = sorted(name for name in vars(model) if not name.startswith("_forward"))
    return hooks, frozen, own, id(model.config), model.config._attn_implementation
