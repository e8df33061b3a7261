"""``save`` and ``load``: PEFT's files, and beside them what PEFT has no field for.

    adapter_config.json          PEFT's PrefixTuningConfig (CartridgeConfig with frozen tokens, PromptTuningConfig)
    adapter_model.safetensors    prompt_embeddings: [P, 2*L*H_kv*D], slots 2i and 2i+1 layer i's keys and values;
                                 of a soft prompt [P, d]; base_model.<name>: modules that are saved with it
    fastprefix_config.json       our own configuration
    prefix_encoder.safetensors   the MLP, when one is trained: training resumes from it

What PEFT cannot represent (a subset of layers, position_offset="none", layers of different shapes, an
encoder-decoder's parts) is written with
``peft_type`` FASTPREFIX and one tensor per layer, so that PEFT refuses it instead of computing something else.

A save replaces all of them or none (:mod:`fastprefix.hf.storage.atomic_folder`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.hf.adapters.attach import attach_made
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation, require_not_patched
from fastprefix.hf.model import wrappers
from fastprefix.hf.model.dtensor import gathered
from fastprefix.hf.storage import saved_modules
from fastprefix.hf.storage.atomic_folder import write_atomically
from fastprefix.hf.storage.peft_format import (
    CONFIG,
    EMBEDDINGS,
    ENCODER,
    FORMAT_VERSION,
    OWN,
    OWN_CONFIG,
    WEIGHTS,
    check_finite,
    digest,
    is_peft,
    pack,
    peft_config,
)
from fastprefix.hf.storage.saved_adapter import SavedAdapter
from fastprefix.hf.storage.validated_files import write_json, write_tensors
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt


def save(model: Any, dir: str | os.PathLike[str], name: str = "default") -> None:
    """Write an attached prefix or soft prompt so that PEFT and :func:`load` both read it.

    Whenever this ends - an error, a full disk, a kill - :func:`load` finds the whole new adapter or the whole one that
    was there before. PEFT finds the same, but for one short moment in which it finds none where the new
    ``adapter_config.json`` differs from the old one; a save killed just then is finished by the next save or load.

    Modules of the configuration's ``modules_to_save`` are written with it, and so is the head of a model for sequence
    or token classification or question answering (``classifier``, ``score``, ``qa_outputs``), as PEFT does, whether it
    was trained by ``modules_to_save`` or by hand. What else is trained a warning names.

    Args:
        model: a model with the prefix attached, also inside DataParallel, DistributedDataParallel, ``torch.compile`` or
            AveragedModel, of which the averages are written. Where it is sharded (FSDP2) every process has to call
            this; the first one writes.
        dir: made if missing; other files in it stay.
        name: of the prefix.

    Raises:
        ValueError: no prefix of this name is attached, or it holds numbers that are not finite, which ``load`` refuses.
        OSError: the files cannot be written.
    """
    installation = require_installation(wrappers.unwrapped(model, but=wrappers.SAVING))
    require_not_patched(installation)
    prefix = installation.selection.named(name)
    wrappers.refuse_flat(installation.model, prefix)
    modules = saved_modules.saved_with(installation, prefix)
    saved_modules.warn_of_left_out(installation, stacklevel=3)
    trained = saved_modules.fields(prefix, modules)  # what is gathered wants no gradient
    with ExitStack() as stack:
        writes = all([stack.enter_context(gathered(module)) for module in (prefix, *modules.values())])
        for parameter, x in (*prefix.state_dict().items(), *saved_modules.tensors(modules).items()):
            check_finite(parameter, x, f"prefix {name!r}")
        if writes:
            _write(installation, prefix, modules, trained, Path(dir))


def _write(
    installation: Installation,
    prefix: Prefix | SoftPrompt,
    modules: Mapping[str, nn.Module],
    trained: Mapping[str, list[str]],
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config, tensors = contents(installation, prefix, modules)
    fields = {"format_version": FORMAT_VERSION, **prefix.config.to_json(), **trained, "weights": digest(tensors)}
    files = {}
    if isinstance(prefix, SoftPrompt):
        fields["kind"] = "prompt"
    else:
        fields["projected"] = prefix.encoder is not None
        if prefix.encoder is not None:
            encoder = {n: x.detach().cpu().contiguous() for n, x in prefix.encoder.state_dict().items()}
            fields["encoder_weights"] = digest(encoder)
            files[ENCODER] = functools.partial(write_tensors, encoder)
    files[WEIGHTS] = functools.partial(write_tensors, tensors)
    files[OWN_CONFIG] = functools.partial(write_json, fields)
    files[CONFIG] = functools.partial(write_json, config)
    write_atomically(folder, files, without=() if ENCODER in files else (ENCODER,))


@torch.no_grad()
def contents(
    installation: Installation, prefix: Prefix | SoftPrompt, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What PEFT reads, where it can: its configuration and its weights, those of modules of the model's among them."""
    config, beside = peft_config(installation.model, prefix, list(modules)), saved_modules.tensors(modules)
    if isinstance(prefix, SoftPrompt):
        return config, {EMBEDDINGS: prefix.embedding.detach().cpu().contiguous(), **beside}
    pairs = [(k.detach().cpu().contiguous(), v.detach().cpu().contiguous()) for k, v in prefix.key_values()]
    if is_peft(prefix, installation.facts.layers):
        return config, {EMBEDDINGS: pack([k for k, _ in pairs], [v for _, v in pairs]), **beside}
    tensors = {
        f"layers.{i}.{n}": x
        for i, kv in zip(prefix.layer_indices, pairs, strict=True)
        for n, x in zip("kv", kv, strict=True)
    }
    return {"peft_type": OWN, "num_virtual_tokens": prefix.num_virtual_tokens}, {**tensors, **beside}


def load(model: Any, dir: str | os.PathLike[str], name: str = "default") -> Prefix | SoftPrompt:
    """Attach what was saved: ours, or PEFT's of type PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING or P_TUNING.

    What was trained through its MLP comes back with it, so that training resumes; :func:`fastprefix.bake` drops it.
    PEFT's files hold the output of its encoders alone: that is what comes back from them. In an encoder-decoder PEFT's
    prefix is one of the decoder's self-attention, whose layers share slots; what it never reads is left out.
    Modules that were saved with it (a classifier's head) come back as the prefix's own, see ``modules_to_save`` of
    :class:`PrefixConfig`: in the model while it is active, and trainable if they were.

    Args:
        model: a transformers model, with other prefixes attached or none.
        dir: as written by :func:`save` or by PEFT's ``save_pretrained``.
        name: to attach it under.

    Returns:
        The trainable :class:`Prefix` or :class:`SoftPrompt`.

    Raises:
        ValueError: a file is missing or malformed (a pickle, numbers that are not finite or no floats, tensors or
            fields of no known meaning), or does not fit the model; path and field are named. Nothing is attached then.
    """
    return attach_made(model, name, SavedAdapter(dir).make)
