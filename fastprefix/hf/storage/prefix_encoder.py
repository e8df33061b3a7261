"""Checkpoints of P-tuning v2 and of ChatGLM's p-tuning: a ``prefix_encoder`` among a model's weights, no adapter files.

    prefix_encoder.embedding.weight      [P, 2*L*H_kv*D], slots 2i and 2i+1 layer i's keys and values, as in PEFT
    prefix_encoder.embedding.weight      [P, d] with an MLP, whose output has that layout:
    prefix_encoder.trans.0.weight, bias  [hidden, d], [hidden]
    prefix_encoder.trans.2.weight, bias  [2*L*H_kv*D, hidden], [2*L*H_kv*D]

Their names may stand behind ``transformer.`` (ChatGLM, whose text keeps its positions from 0; in P-tuning v2 the text
comes after the prefix). The other tensors are those of the whole model, or none: the frozen ones have to be the model's
own, and a head next to them is the prefix's.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.storage.atomic_folder import resolve_path
from fastprefix.hf.storage.peft_format import CONFIG, EMBEDDINGS, ENCODER, WEIGHTS, errors_naming
from fastprefix.hf.storage.saved_adapter import SavedAdapter
from fastprefix.hf.storage.saved_modules import BASE
from fastprefix.hf.storage.validated_files import check_file, check_finite, read_tensors, shown
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt
from fastprefix.validation import FLOATS

_FILES = ("model.safetensors", "pytorch_model.bin")
_PREFIXES = ("", "transformer.")
_EMBEDDING = "prefix_encoder.embedding.weight"
_MLP = {
    "trans.0.weight": "down.weight",
    "trans.0.bias": "down.bias",
    "trans.2.weight": "up.weight",
    "trans.2.bias": "up.bias",
}
_BUFFERS = (".position_ids", ".token_type_ids", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def checkpoint_file(folder: Path) -> Path | None:
    """The file of weights that ``load`` was given, or that lies in a folder without an adapter; None for an adapter."""
    if folder.suffix in (".bin", ".safetensors") and not folder.is_dir():
        return folder
    if os.path.lexists(resolve_path(folder, CONFIG)) or not folder.is_dir():
        return None
    return next((folder / name for name in _FILES if (folder / name).exists()), None)


class PrefixEncoderCheckpoint(SavedAdapter):
    """The prefix in such a checkpoint, in the form of an adapter; ValueError names path and tensor of what is wrong."""

    def __init__(self, path: Path) -> None:
        self.folder, self.own, self.peft = path.parent, None, {}
        self.paths = dict.fromkeys((CONFIG, WEIGHTS, ENCODER), path)
        self.trained: list[str] = []
        self.frozen: list[str] = []
        self.modules = {}
        stored = _read(path)
        at = next((prefix for prefix in _PREFIXES if f"{prefix}{_EMBEDDING}" in stored), None)
        if at is None:
            expected = f"{_EMBEDDING}, of P-tuning v2 or ChatGLM (or an adapter's folder, with {CONFIG})"
            raise fail(str(path), "weights without a prefix", expected)
        own = f"{at}prefix_encoder."
        encoder = {name.removeprefix(own): x for name, x in stored.items() if name.startswith(own)}
        self.rest = {name: x for name, x in stored.items() if not name.startswith(own)}
        self._take(encoder, own, "none" if at else "after_prefix")

    def _take(self, encoder: Mapping[str, Tensor], own: str, offset: Any) -> None:
        """Check the encoder's tensors against each other, and make the prefix's configuration and numbers of them."""
        path = self.paths[WEIGHTS]
        embedding = encoder["embedding.weight"]
        for name, x in encoder.items():
            if name not in ("embedding.weight", *_MLP):
                expected = f"embedding.weight and {', '.join(_MLP)}"
                raise fail(f"{path}: {own}{name}"[:500], "a tensor of no known meaning", expected)
            if x.dtype not in FLOATS:
                raise fail(f"{path}: {own}{name}", f"dtype {x.dtype}", " or ".join(str(d) for d in FLOATS))
            check_finite(own + name, x, str(path))
        if embedding.dim() != 2:
            raise fail(f"{path}: {own}embedding.weight", f"shape {list(embedding.shape)}", "[P, 2*L*H_kv*D] or [P, d]")
        tokens, width = embedding.shape
        projected = len(encoder) > 1
        hidden = None
        self.encoder = None
        if projected:
            first, last = (encoder.get(f"trans.{i}.weight", torch.empty(0)) for i in (0, 2))
            hidden, outputs = len(first), len(last)
            want = {
                "trans.0.weight": ("[hidden, d]", [hidden, width]),
                "trans.0.bias": ("[hidden]", [hidden]),
                "trans.2.weight": ("[2*L*H_kv*D, hidden]", [outputs, hidden]),
                "trans.2.bias": ("[2*L*H_kv*D]", [outputs]),
            }
            for name, (dims, sizes) in want.items():
                if name not in encoder:
                    raise fail(f"{path}: {own}{name}", "no such tensor", dims)
                if list(encoder[name].shape) != sizes:
                    got = f"shape {list(encoder[name].shape)}"
                    raise fail(f"{path}: {own}{name}", got, f"{dims} = {sizes}, as in the other tensors")
            self.encoder = {ours: encoder[theirs].float() for theirs, ours in _MLP.items()}
            self.encoder["embedding"] = embedding.float()
            inner = torch.tanh(embedding.float() @ self.encoder["down.weight"].T + self.encoder["down.bias"])
            embedding = inner @ self.encoder["up.weight"].T + self.encoder["up.bias"]
        with errors_naming(path):
            self.config = PrefixConfig(
                tokens, prefix_projection=projected, encoder_hidden_size=hidden, position_offset=offset
            )
        self.tensors = {EMBEDDINGS: embedding.float().contiguous()}

    def build(self, installation: Installation) -> Prefix | SoftPrompt:
        """A new prefix for a model, with the head that was trained with it."""
        self._take_heads(installation)
        return super().build(installation)

    def _take_heads(self, installation: Installation) -> None:
        """Sort the checkpoint's other tensors: the model's own numbers, and heads whose numbers differ from them."""
        model, path = installation.model, self.paths[WEIGHTS]
        with installation.modules.in_place({}):
            own = dict(model.state_dict())
        base = f"{model.base_model_prefix}."
        heads: set[str] = set()
        for name, x in self.rest.items():
            if name.endswith(_BUFFERS) and name not in own:
                continue  # older transformers stored what is a constant of the class
            if name not in own:
                got = "a tensor that is no part of the prefix"
                raise fail(f"{path}: {shown(name)}", got, f"one that {type(model).__name__} has")
            if own[name].shape == x.shape and torch.equal(own[name].cpu(), x.to(own[name].dtype)):
                continue
            if name.startswith(base) or "." not in name:
                expected = f"those of this {type(model).__name__}: the prefix was trained in front of another model"
                raise fail(f"{path}: {name}", "other numbers", expected)
            heads.add(name.partition(".")[0])
        self.trained = sorted(heads)
        self.modules = {f"{BASE}{name}": x for name, x in self.rest.items() if name.partition(".")[0] in heads}


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; of a pickle nothing but tensors is read (``weights_only``)."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    check_file(path, "weights of P-tuning v2 or ChatGLM")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, ValueError, UnpicklingError, EOFError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise fail(str(path), f"no weights ({reason})", "named tensors alone, as torch.save writes them") from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(x, Tensor) for k, x in found.items()):
        raise fail(str(path), type(found).__name__, "named tensors alone")
    return found
