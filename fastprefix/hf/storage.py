"""``save`` and ``load``: PEFT's files, and beside them what PEFT has no field for.

    adapter_config.json          PEFT's PrefixTuningConfig (CartridgeConfig with frozen tokens, PromptTuningConfig)
    adapter_model.safetensors    prompt_embeddings: [P, 2*L*H_kv*D], slots 2i and 2i+1 layer i's keys and values;
                                 of a soft prompt [P, d]
    fastprefix_config.json       our own configuration
    prefix_encoder.safetensors   the MLP, when one is trained: training resumes from it

What PEFT cannot represent (a subset of layers, position_offset="none", layers of different shapes, an
encoder-decoder's parts) is written with
``peft_type`` FASTPREFIX and one tensor per layer, so that PEFT refuses it instead of computing something else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastprefix.hf.build import build
from fastprefix.hf.files import field, read_json, read_tensors, replace
from fastprefix.hf.formats import (
    CONFIG,
    EMBEDDINGS,
    ENCODER,
    FORMAT_VERSION,
    OWN_CONFIG,
    WEIGHTS,
    digest,
    is_peft,
    own_configuration,
    pack,
    peft_config,
    peft_configuration,
    stored_embedding,
    stored_key_values,
)
from fastprefix.hf.install import attach, own
from fastprefix.hf.installation import Installation
from fastprefix.hf.state import installation
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import PromptConfig, SoftPrompt
from fastprefix.validation import fail


def save(model: Any, dir: str | os.PathLike[str], name: str = "default") -> None:
    """Write an attached prefix or soft prompt so that PEFT and :func:`load` both read it.

    Args:
        model: a model with the prefix attached.
        dir: made if missing; each file is replaced whole or not at all.
        name: of the prefix.

    Raises:
        ValueError: no prefix of this name is attached.
    """
    state = own(installation(model))
    prefix = state.named(name)
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"format_version": FORMAT_VERSION, **prefix.config.to_json()}
    encoder = prefix.encoder if isinstance(prefix, Prefix) else None
    config = peft_config(state.model, prefix)
    if isinstance(prefix, SoftPrompt):
        fields["kind"] = "prompt"
        tensors = {EMBEDDINGS: prefix.embedding.detach().cpu().contiguous()}
    else:
        fields["projected"] = encoder is not None
        with torch.no_grad():
            pairs = [(k.detach().cpu().contiguous(), v.detach().cpu().contiguous()) for k, v in prefix.key_values()]
        if is_peft(prefix, state.layers):
            tensors = {EMBEDDINGS: pack([k for k, _ in pairs], [v for _, v in pairs])}
        else:
            tensors = {
                f"layers.{i}.{n}": x
                for i, kv in zip(prefix.layer_indices, pairs, strict=True)
                for n, x in zip("kv", kv, strict=True)
            }
            config = {"peft_type": "FASTPREFIX", "num_virtual_tokens": prefix.num_virtual_tokens}
    fields["weights"] = digest(tensors)
    if encoder is not None:
        state_dict = {n: x.detach().cpu().contiguous() for n, x in encoder.state_dict().items()}
        replace(folder / ENCODER, lambda path: save_file(state_dict, path))
    else:
        (folder / ENCODER).unlink(missing_ok=True)
    replace(folder / WEIGHTS, lambda path: save_file(tensors, path))
    replace(folder / OWN_CONFIG, lambda path: Path(path).write_text(json.dumps(fields, indent=2) + "\n"))
    replace(folder / CONFIG, lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"))


class Stored:
    """A folder's adapter: its configuration, and its numbers for a prefix made from it."""

    def __init__(self, folder: Path) -> None:
        peft = read_json(folder / CONFIG)
        ours = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).exists() else None
        field(peft, "peft_type", str, folder / CONFIG)
        self.folder = folder
        self.digest = None if ours is None else ours.get("weights")
        self.config: PrefixConfig | PromptConfig = (
            peft_configuration(peft, folder / CONFIG) if ours is None else own_configuration(ours, folder / OWN_CONFIG)
        )
        self.tensors = read_tensors(folder / WEIGHTS)
        self.encoder = read_tensors(folder / ENCODER) if ours is not None and ours.get("projected") else None

    def fill(self, prefix: Prefix | SoftPrompt) -> None:
        """Put the numbers into a new prefix; ValueError naming path and tensor when they do not fit."""
        path = self.folder / WEIGHTS
        if isinstance(prefix, SoftPrompt):
            with torch.no_grad():
                prefix.embedding.copy_(stored_embedding(self.tensors, prefix, path))
            return self.check_digest()
        keys, values = stored_key_values(self.tensors, prefix, path)
        if self.encoder is None:
            prefix.set_direct(
                *([x.float().to(d) for x, d in zip(part, prefix.devices(), strict=True)] for part in (keys, values))
            )
        elif prefix.encoder is not None:
            load_encoder(prefix, self.encoder, self.folder / ENCODER)
        self.check_digest()

    def check_digest(self) -> None:
        """Raise ValueError when somebody, PEFT say, has written other weights beside our configuration."""
        if self.digest is not None and digest(self.tensors) != self.digest:
            expected = f"those of {OWN_CONFIG} (delete it, and {ENCODER}, to load PEFT's)"
            raise fail(str(self.folder / WEIGHTS), "weights that were replaced since", expected)


def load(model: Any, dir: str | os.PathLike[str], name: str = "default") -> Prefix | SoftPrompt:
    """Attach what was saved: ours, or PEFT's of type PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING or P_TUNING.

    What was trained through its MLP comes back with it, so that training resumes; :func:`fastprefix.bake` drops it.
    PEFT's files hold the output of its encoders alone: that is what comes back from them. In an encoder-decoder PEFT's
    prefix is one of the decoder's self-attention, whose layers share slots; what it never reads is left out.

    Args:
        model: a transformers model, with other prefixes attached or none.
        dir: as written by :func:`save` or by PEFT's ``save_pretrained``.
        name: to attach it under.

    Returns:
        The trainable :class:`Prefix` or :class:`SoftPrompt`.

    Raises:
        ValueError: a file is missing or malformed, or does not fit the model; path and field are named.
    """
    stored = Stored(Path(dir))
    if isinstance(stored.config, PromptConfig):
        return attach(model, stored.config, name, weights=stored.fill)
    return attach(model, stored.config, name, weights=stored.fill)


def read_prefix(state: Installation, dir: str | os.PathLike[str]) -> Prefix | SoftPrompt:
    """What was saved, for a model but not in it; errors as of :func:`load`."""
    stored = Stored(Path(dir))
    prefix = build(state, stored.config)
    stored.fill(prefix)
    return prefix


def load_encoder(prefix: Prefix, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy an MLP's weights into the prefix's; ValueError naming the tensor that does not fit."""
    assert prefix.encoder is not None
    for key, x in prefix.encoder.state_dict().items():
        if key not in tensors or tensors[key].shape != x.shape:
            got = f"shape {list(tensors[key].shape)}" if key in tensors else "no such tensor"
            raise fail(f"{path}: {key}", got, f"shape {list(x.shape)}")
    prefix.encoder.load_state_dict(tensors)
