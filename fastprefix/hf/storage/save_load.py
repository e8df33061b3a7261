"""``save`` and ``load``: PEFT's files, and next to them files for everything that PEFT has no field for.

    adapter_config.json          PEFT's PrefixTuningConfig (CartridgeConfig with frozen tokens, PromptTuningConfig, or
                                 PromptEncoderConfig with an encoder; AdaptionPromptConfig for a LLaMA-Adapter)
    adapter_model.safetensors    prompt_embeddings: [P, 2*L*H_kv*D], slots 2i and 2i+1 layer i's keys and values;
                                 [P, d] for a soft prompt; base_model.<name>: modules that are saved with it
    fastprefix_config.json       fastprefix's own configuration
    prefix_encoder.safetensors   the MLP or a soft prompt's encoder, when one is trained: training resumes from it
    README.md                    a model card for the Hub, unless there is one that somebody else wrote or edited

A prefix that PEFT cannot represent (a subset of layers, position_offset="none", layers of different shapes, an
encoder-decoder's parts, gates) is written with ``peft_type`` FASTPREFIX and one tensor per layer, so that PEFT refuses
it instead of computing something else. So is a soft prompt with a place inside the text, as PEFT would drop a field
that it does not know, and put the prompt in front.

A save replaces all files or none (:mod:`fastprefix.hf.storage.atomic_folder`).
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

from fastprefix.hf.adapters.attach import attach_prefix
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation, require_not_patched
from fastprefix.hf.model import wrappers
from fastprefix.hf.model.dtensor import gathered
from fastprefix.hf.storage import layer_tensors, model_card, saved_modules
from fastprefix.hf.storage.atomic_folder import write_atomically
from fastprefix.hf.storage.hub import adapter_folder
from fastprefix.hf.storage.peft_format import (
    CONFIG,
    EMBEDDINGS,
    ENCODER,
    FORMAT_VERSION,
    KINDS,
    OWN,
    OWN_CONFIG,
    WEIGHTS,
    is_peft,
    pack,
    peft_config,
)
from fastprefix.hf.storage.prefix_encoder import PrefixEncoderCheckpoint, checkpoint_file
from fastprefix.hf.storage.saved_adapter import FILES, SavedAdapter
from fastprefix.hf.storage.validated_files import check_finite, digest, write_json, write_tensors
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt


def save(model: Any, dir: str | os.PathLike[str], name: str = "default") -> None:
    """Write an attached prefix or soft prompt so that PEFT and :func:`load` both read it.

    However the save ends - by an error, a full disk, a kill - :func:`load` finds either the whole new adapter or the
    whole old one. So does PEFT, except for a short moment if the new ``adapter_config.json`` differs from the old one:
    then PEFT finds no adapter. A save that is killed in that moment is completed by the next save or load.

    Modules of the configuration's ``modules_to_save`` are written with the prefix. As in PEFT, so is the head of a
    model for sequence or token classification or question answering (``classifier``, ``score``, ``qa_outputs``),
    whether it was trained by ``modules_to_save`` or by hand. A warning names all other trained parameters.

    A model card, ``README.md``, says what the adapter is and how it is loaded. A card that was there before stays,
    unless an earlier save wrote it and nobody has edited it.

    Args:
        model: a model with the prefix attached, also inside DataParallel, DistributedDataParallel, ``torch.compile`` or
            AveragedModel (whose averages are written). If it is sharded (FSDP2, tensor parallelism), every process
            has to call this function, and the first process writes.
        dir: the folder, created if missing; other files in it stay.
        name: name of the prefix.

    Raises:
        ValueError: no prefix of this name is attached, or it has numbers that are not finite, which ``load`` refuses.
        OSError: the files cannot be written.
    """
    installation = require_installation(wrappers.unwrapped(model, but=wrappers.SAVING))
    require_not_patched(installation)
    prefix = installation.selection.named(name)
    wrappers.refuse_flat(installation.model, prefix)
    modules = saved_modules.saved_with(installation, prefix)
    saved_modules.warn_of_left_out(installation, stacklevel=3)
    trained = saved_modules.fields(prefix, modules)  # before gathering, as gathered parameters require no gradient
    with ExitStack() as stack:
        together = installation.facts.layers.shards is not None  # processes that have one prefix between them
        found = (prefix, *modules.values())
        writes = all([stack.enter_context(gathered(module, together)) for module in found])
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
    if isinstance(prefix.config, tuple(KINDS.values())):
        fields["kind"] = next(kind for kind, config in KINDS.items() if isinstance(prefix.config, config))
    if isinstance(prefix.config, PrefixConfig) or prefix.encoder is not None:
        fields["projected"] = prefix.encoder is not None
    if prefix.encoder is not None:
        encoder = {n: x.detach().cpu().contiguous() for n, x in prefix.encoder.state_dict().items()}
        fields["encoder_weights"] = digest(encoder)
        files[ENCODER] = functools.partial(write_tensors, encoder)
    files[WEIGHTS] = functools.partial(write_tensors, tensors)
    files[OWN_CONFIG] = functools.partial(write_json, fields)
    if model_card.may_write(folder):
        card = model_card.card(installation.model, prefix, config, tensors)
        files[model_card.CARD] = functools.partial(model_card.write, card)
    files[CONFIG] = functools.partial(write_json, config)
    write_atomically(folder, files, without=() if ENCODER in files else (ENCODER,))


@torch.no_grad()
def contents(
    installation: Installation, prefix: Prefix | SoftPrompt, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights (with those of ``modules``), in PEFT's format if PEFT can represent the prefix."""
    config, beside = peft_config(installation.model, prefix, list(modules)), saved_modules.tensors(modules)
    if isinstance(prefix, SoftPrompt):
        return config, {EMBEDDINGS: prefix.without_dropout().cpu().contiguous(), **beside}
    if not isinstance(prefix.config, PrefixConfig):
        own = layer_tensors.tensors(prefix)
        if layer_tensors.is_adaption(installation, prefix) and not beside:
            return config, layer_tensors.to_adaption(installation, own)
        return {"peft_type": OWN, "num_virtual_tokens": prefix.num_virtual_tokens}, {**own, **beside}
    pairs = [(k.detach().cpu().contiguous(), v.detach().cpu().contiguous()) for k, v in prefix.key_values()]
    if is_peft(prefix, installation.facts.layers):
        return config, {EMBEDDINGS: pack([k for k, _ in pairs], [v for _, v in pairs]), **beside}
    tensors = {
        f"layers.{i}.{n}": x
        for i, kv in zip(prefix.layer_indices, pairs, strict=True)
        for n, x in zip("kv", kv, strict=True)
    }
    tensors.update(layer_tensors.tensors(prefix))
    return {"peft_type": OWN, "num_virtual_tokens": prefix.num_virtual_tokens}, {**tensors, **beside}


def load(
    model: Any, dir: str | os.PathLike[str], name: str = "default", *, revision: str | None = None
) -> Prefix | SoftPrompt:
    """Attach a saved adapter: fastprefix's, P-tuning v2's, or PEFT's PREFIX_TUNING, CARTRIDGE,
    PROMPT_TUNING, P_TUNING or ADAPTION_PROMPT (of a Llama or Mistral).

    A prefix that was trained through an MLP is loaded with the MLP, a soft prompt with its encoder, so that training
    resumes; :func:`fastprefix.bake` drops them. PEFT's files hold only the output of its encoders, which is loaded as
    keys and values or embeddings. In an encoder-decoder, PEFT's prefix is one of the decoder's self-attention, whose
    layers share slots; slots that PEFT never reads are left out. One that a patched model trained is of
    cross-attention too. Modules that were saved with the adapter (a
    classifier's head) become the prefix's own, see ``modules_to_save`` of :class:`PrefixConfig`: they are in the model
    while the prefix is active, and trainable if they were trained.

    A checkpoint of the P-tuning v2 repository or of ChatGLM's p-tuning is weights that hold a ``prefix_encoder``, with
    its MLP if it has one (:mod:`fastprefix.hf.storage.prefix_encoder`). Of a ``.bin`` file only tensors are read. The
    whole model's weights in that file have to be the model's own, and the head next to them becomes the prefix's.

    Args:
        model: a transformers model, with or without other attached prefixes.
        dir: a folder written by :func:`save` or by PEFT's ``save_pretrained``, or ``"namespace/name"`` of a repository
            on the Hugging Face Hub with the files of one. Whatever exists under this path comes first. A repository's
            files are downloaded to the Hub's cache; what is there is used as it is offline (``HF_HUB_OFFLINE=1``).
            Weights with a ``prefix_encoder`` are a file, or ``model.safetensors`` or ``pytorch_model.bin`` in a folder.
        name: the name to attach it under.
        revision: branch, tag or commit of the repository; None for its main branch, and for a folder.

    Returns:
        The trainable :class:`Prefix` or :class:`SoftPrompt`.

    Raises:
        ValueError: a file is missing or malformed (a pickle of other things than tensors, numbers that are not finite
            or no floats, tensors or fields of no known meaning), or does not fit the model; path and field are named.
            There is neither a folder nor a repository of this name, or a folder comes with a ``revision``. Nothing is
            attached then.
    """
    folder = adapter_folder(dir, FILES, revision)
    weights = checkpoint_file(folder)
    saved = SavedAdapter(folder) if weights is None else PrefixEncoderCheckpoint(weights)
    return attach_prefix(model, name, saved.build)
