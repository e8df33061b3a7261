"""The modules that are saved with a prefix: which they are, their keys, and trained parameters that no file holds.

PEFT's keys are ``base_model.<name of the module>.<name of the tensor>``. For sequence classification, token
classification and question answering PEFT trains, saves and expects the model's head, whatever its configuration
says. The head is therefore always in the file, trained or not, and is loaded as it was.
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
from fastprefix.hf.storage.peft_format import task
from fastprefix.hf.storage.validated_files import check_finite, field, shown
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt

BASE = "base_model."
FROZEN = "frozen_modules"  # saved, but not trainable once loaded
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def saved_with(installation: Installation, prefix: Prefix | SoftPrompt) -> dict[str, nn.Module]:
    """The modules to save with a prefix, by path: its own copies and, where it has none, the head of the task."""
    heads = installation.modules.matching(HEADS.get(task(installation.model), ()))
    own = prefix.modules_to_save.named()
    # PEFT saves heads that contain its own modules itself, and its files have no place for quantised weights.
    return {**{path: m for path, m in heads.items() if is_plain(m) and not is_pefts(m)}, **own}


def fields(prefix: Prefix | SoftPrompt, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The configuration fields that list these modules' names, the trained ones and the others."""
    own = prefix.config.modules_to_save is not None
    trained = [
        path
        for path, module in modules.items()
        if any(p.requires_grad for p in module.parameters()) or (own and path in prefix.modules_to_save.named())
    ]
    found = {"modules_to_save": trained, FROZEN: [path for path in modules if path not in trained]}
    return {name: paths for name, paths in found.items() if paths}


def tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The modules' weights and buffers under PEFT's keys."""
    return {
        f"{BASE}{path}.{name}": x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for path, module in modules.items()
        for name, x in offload.state_dict(module).items()
    }


def check(stored: Mapping[str, Tensor], modules: Mapping[str, nn.Module], path: Path) -> None:
    """Check that the stored tensors are those of these modules, and no others.

    Raises:
        ValueError: a tensor is missing, unknown or malformed; path and tensor are named.
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
    """Copy stored tensors, which were checked, into these modules."""
    for path, module in modules.items():
        for name, x in module.state_dict().items():
            x.copy_(stored[f"{BASE}{path}.{name}"])


def names(data: dict[str, Any], name: str, path: Path) -> list[str]:
    """A configuration field that lists names of modules; ValueError naming path and field when it is malformed."""
    found = field(data, name, list, path, None) or []
    for each in found:
        if not isinstance(each, str) or not each:
            raise fail(f"{path}: {name}", shown(found), "names of modules")
    return list(dict.fromkeys(found))


def left_out(installation: Installation) -> list[str]:
    """Names of trainable parameters that no prefix's files hold."""
    kept = {id(p) for prefix in installation.selection.prefixes.values() for p in prefix.parameters()}
    for prefix in installation.selection.prefixes.values():
        kept |= {id(p) for module in saved_with(installation, prefix).values() for p in module.parameters()}
    return [name for name, p in installation.model.named_parameters() if p.requires_grad and id(p) not in kept]


def warn_of_left_out(installation: Installation, stacklevel: int) -> None:
    """Warn of trainable parameters that are not saved."""
    if found := left_out(installation):
        more = f" and {len(found) - 3} more" if found[3:] else ""
        warnings.warn(
            f"fastprefix: trained beside the prefix and not saved with it: {', '.join(found[:3])}{more}. Modules that "
            "are named in modules_to_save of the configuration are; PEFT's save_pretrained saves its adapters",
            stacklevel=stacklevel,
        )
