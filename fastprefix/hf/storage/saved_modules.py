"""Modules that are saved with a prefix: which, under which keys, and what is trained and yet in no file.

PEFT's keys are ``base_model.<name of the module>.<name of the tensor>``. Of a classifier, a tagger and a model that
answers questions PEFT trains, saves and wants the head, whatever the configuration says: so the head is in the file
whether it was trained or not, and comes back as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.modules_to_save import is_pefts, is_plain
from fastprefix.hf.model import offload
from fastprefix.hf.storage.peft_format import check_finite, task
from fastprefix.hf.storage.validated_files import field, shown
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt

BASE = "base_model."
FROZEN = "frozen_modules"  # saved, and not to be trained when they are loaded
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def saved_with(installation: Installation, prefix: Prefix | SoftPrompt) -> dict[str, nn.Module]:
    """What is saved with a prefix: its own copies and, where it has none, the head of the model's task."""
    heads = installation.modules.matching(HEADS.get(task(installation.model), ()))
    own = prefix.modules_to_save.named()
    # What PEFT has put into a head it saves itself, and what is quantised no file of its takes.
    return {**{path: m for path, m in heads.items() if is_plain(m) and not is_pefts(m)}, **own}


def fields(prefix: Prefix | SoftPrompt, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Their names in our configuration: which are trained, and which are not."""
    own = prefix.config.modules_to_save is not None
    trained = [
        path
        for path, module in modules.items()
        if any(p.requires_grad for p in module.parameters()) or (own and path in prefix.modules_to_save.named())
    ]
    found = {"modules_to_save": trained, FROZEN: [path for path in modules if path not in trained]}
    return {name: paths for name, paths in found.items() if paths}


def tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Their weights and buffers under PEFT's keys."""
    return {
        f"{BASE}{path}.{name}": x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for path, module in modules.items()
        for name, x in offload.state_dict(module).items()
    }


def check(stored: Mapping[str, Tensor], modules: Mapping[str, nn.Module], path: Path) -> None:
    """There are the tensors of these modules and no others.

    Raises:
        ValueError: not so; path and tensor are named.
    """
    want = {f"{BASE}{name}.{n}": x for name, module in modules.items() for n, x in module.state_dict().items()}
    for name, x in want.items():
        if name not in stored:
            raise fail(f"{path}: {name}", "no such tensor", f"shape {list(x.shape)}, of a module saved with the prefix")
        if stored[name].shape != x.shape:
            got = f"shape {list(stored[name].shape)}"
            raise fail(f"{path}: {name}", got, f"shape {list(x.shape)} of this model")
        if stored[name].is_floating_point() != x.is_floating_point():
            raise fail(f"{path}: {name}", f"dtype {stored[name].dtype}", f"{x.dtype} or its like")
    for name, x in stored.items():
        if name not in want:
            raise fail(f"{path}: {shown(name)}", "a tensor that is no part of a prefix", "modules_to_save to name it")
        check_finite(name, x, str(path))


@torch.no_grad()
def fill(stored: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    """Put the numbers into modules that they fit."""
    for path, module in modules.items():
        for name, x in module.state_dict().items():
            x.copy_(stored[f"{BASE}{path}.{name}"])


def names(data: dict[str, Any], name: str, path: Path) -> list[str]:
    """A field with modules' names; ValueError naming path and field when it is malformed."""
    found = field(data, name, list, path, None) or []
    for each in found:
        if not isinstance(each, str) or not each:
            raise fail(f"{path}: {name}", shown(found), "names of modules")
    return list(dict.fromkeys(found))


def left_out(installation: Installation) -> list[str]:
    """Names of parameters that are trained and that no file of a prefix holds."""
    kept = {id(p) for prefix in installation.selection.prefixes.values() for p in prefix.parameters()}
    for prefix in installation.selection.prefixes.values():
        kept |= {id(p) for module in saved_with(installation, prefix).values() for p in module.parameters()}
    return [name for name, p in installation.model.named_parameters() if p.requires_grad and id(p) not in kept]


def warn_of_left_out(installation: Installation, stacklevel: int) -> None:
    """Say what is trained and not in the file."""
    if found := left_out(installation):
        more = f" and {len(found) - 3} more" if found[3:] else ""
        warnings.warn(
            f"fastprefix: trained beside the prefix and not saved with it: {', '.join(found[:3])}{more}. Modules that "
            "are named in modules_to_save of the configuration are; PEFT's save_pretrained saves its adapters",
            stacklevel=stacklevel,
        )
