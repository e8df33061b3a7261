"""``save_pretrained`` and ``from_pretrained``: a whole model with its prefixes in one folder.

    config.json, model.safetensors, ...      the bare model, as transformers' ``save_pretrained`` writes it
    fastprefix/prefixes.json                 names of the prefixes, and of the active one
    fastprefix/<name>/...                    each prefix, as :func:`fastprefix.save` writes it

The prefixes' parameters are children of the model's modules, so ``model.save_pretrained`` writes them among the
weights, where transformers does not know them; and of a module that a prefix has a trained copy of, it writes the
active one's. Here they are taken out of the model while transformers writes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.attach import attach_prefix, check_name, set_prefix
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation, require_not_patched
from fastprefix.hf.adapters.modules_to_save import ENCODERS, KEPT, is_pefts
from fastprefix.hf.attention.function import SLOT
from fastprefix.hf.model import dtensor, wrappers
from fastprefix.hf.storage import model_card
from fastprefix.hf.storage.atomic_folder import (
    Commit,
    committed,
    complete_interrupted_save,
    read_consistently,
    replace_files,
)
from fastprefix.hf.storage.peft_format import CONFIG
from fastprefix.hf.storage.save_load import save
from fastprefix.hf.storage.saved_adapter import SavedAdapter
from fastprefix.hf.storage.validated_files import field, read_json, shown, write_json

KEY, FOLDER, INDEX = "config.json", "fastprefix", "fastprefix/prefixes.json"
FORMAT_VERSION = 1
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def save_pretrained(model: Any, dir: str | os.PathLike[str], max_shard_size: int | str = "50GB") -> None:
    """Write a model with all its attached prefixes into one folder, which :func:`fastprefix.from_pretrained` reads.

    transformers' ``from_pretrained`` reads the bare model from it, and :func:`fastprefix.load` each prefix from
    ``dir/fastprefix/<name>``. All of the folder's files are replaced or none, as by :func:`fastprefix.save`; weights of
    an earlier model and prefixes that are no longer attached are deleted. Prefixes on disk
    (:func:`fastprefix.register`) stay where they are.

    ``model.save_pretrained`` is transformers' own: it writes the prefixes' numbers as keys that ``from_pretrained``
    reports as unexpected and drops, and that a plain ``Trainer`` resumes from.

    Args:
        model: a model with prefixes attached, also inside DataParallel, DistributedDataParallel or ``torch.compile``.
        dir: the folder, created if missing; other files in it stay.
        max_shard_size: above this size the bare model's weights are several files, as in transformers.

    Raises:
        ValueError: no prefix is attached, or one holds numbers that are not finite; the model is sharded, or holds
            PEFT's adapters; the folder holds an adapter.
        OSError: the files cannot be written.
    """
    model = wrappers.unwrapped(model, but=wrappers.SAVING)
    installation = require_installation(model)
    require_not_patched(installation)
    model = installation.model
    dtensor.refuse(model)
    if not installation.selection.prefixes:
        raise fail("model", f"{type(model).__name__} without an attached prefix", "one: model.save_pretrained saves it")
    if installation.selection.chosen is not None or installation.selection.shared is not None:
        raise fail("model", "one inside a block of prefix_batch or shared_prompt", "the block's end first")
    if is_pefts(model):
        raise fail("model", f"{type(model).__name__} with PEFT's adapters in it", "one without: merge or unload them")
    folder = Path(dir)
    if os.path.lexists(folder / CONFIG):
        raise fail("dir", f"{folder}, which holds an adapter ({CONFIG})", "another folder: transformers would load it")
    folder.mkdir(parents=True, exist_ok=True)

    def fill(staging: Path) -> Commit:
        names = list(installation.selection.prefixes)
        for name in names:
            save(model, staging / FOLDER / name, name)
            if not model_card.may_write(folder / FOLDER / name):
                (staging / FOLDER / name / model_card.CARD).unlink()
        index = {"format_version": FORMAT_VERSION, "prefixes": names, "active": installation.selection.active}
        write_json(index, str(staging / INDEX))
        with installation.lock.hold(), _bare(installation):
            model.save_pretrained(staging, max_shard_size=max_shard_size)
        found = [path.relative_to(staging).as_posix() for path in sorted(staging.rglob("*")) if path.is_file()]
        found.sort(key=lambda name: name == KEY)
        without = [name for name in _earlier(folder) if name not in found]
        return Commit(tuple(found), tuple(without), hidden=True)

    replace_files(folder, fill)


def _earlier(folder: Path) -> Iterator[str]:
    """Names of a folder's weights and prefixes, but for cards that somebody has written."""
    for path in folder.iterdir():
        if path.is_file() and _WEIGHTS.fullmatch(path.name):
            yield path.name
    for path in (folder / FOLDER).rglob("*"):
        if path.is_file() and (path.name != model_card.CARD or model_card.may_write(path.parent)):
            yield path.relative_to(folder).as_posix()


@contextmanager
def _bare(installation: Installation) -> Iterator[None]:
    """Take everything of fastprefix's out of the model's modules inside the block."""
    taken: list[tuple[nn.Module, str, nn.Module | None]] = []
    with installation.modules.in_place({}):
        for module in list(installation.model.modules()):
            for name in (SLOT, ENCODERS, KEPT):
                if name in module._modules:
                    taken.append((module, name, module._modules.pop(name)))
        try:
            yield
        finally:
            for module, name, child in taken:
                module._modules[name] = child


def from_pretrained(dir: str | os.PathLike[str], *, model_class: Any = None, **options: Any) -> Any:
    """A model with its prefixes, from a folder that :func:`fastprefix.save_pretrained` wrote.

    The prefixes come back under their names, with the MLPs and heads that were saved with them, trainable, and the one
    is active that was. A save that was killed is completed first.

    Args:
        dir: the folder.
        model_class: whose ``from_pretrained`` makes the bare model; default the class in transformers that was saved.
        options: further arguments of ``model_class.from_pretrained`` (``dtype``, ``device_map``, ...).

    Returns:
        The transformers model, frozen but for its prefixes, in eval mode.

    Raises:
        ValueError: a file of the prefixes is missing or malformed, or does not fit the model; path and field are named.
        OSError: transformers finds no model in the folder.
    """
    folder = Path(dir)
    complete_interrupted_save(folder)
    if committed(folder) is not None:
        expected = "a folder that can be written, where it is completed"
        raise fail("dir", f"{folder} with a save that was killed and not completed", expected)

    def read(where: Callable[[str], Path]) -> Any:
        return _read(folder, where(INDEX), model_class, options)

    weights = [path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)] if folder.is_dir() else []
    return read_consistently(folder, (KEY, INDEX, *weights), read)


def _read(folder: Path, path: Path, model_class: Any, options: dict[str, Any]) -> Any:
    index = read_json(path, "a folder written by fastprefix.save_pretrained")
    if field(index, "format_version", int, path) != FORMAT_VERSION:
        raise fail(f"{path}: format_version", shown(index["format_version"]), str(FORMAT_VERSION))
    names, active = field(index, "prefixes", list, path), field(index, "active", str, path, None)
    for name in names:
        try:
            check_name(name)
        except ValueError as error:
            raise fail(f"{path}: prefixes", shown(names), "names of prefixes") from error
    if active is not None and active not in names:
        raise fail(f"{path}: active", shown(active), f"None or one of {names}")
    saved = {name: SavedAdapter(folder / FOLDER / name) for name in names}
    model = _model_class(folder, model_class).from_pretrained(folder, **options)
    for name, adapter in saved.items():
        attach_prefix(model, name, adapter.build)
    set_prefix(model, active)
    return model


def _model_class(folder: Path, given: Any) -> Any:
    """The class whose ``from_pretrained`` makes the bare model."""
    if given is not None:
        return given
    path = folder / KEY
    classes = field(read_json(path), "architectures", list, path, None) or [None]
    found = None
    with suppress(AttributeError, TypeError):
        found = getattr(transformers, classes[0])
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise fail("model_class", f"None, where {path} names {shown(classes[0])}", "the class: transformers has none")
    return found
