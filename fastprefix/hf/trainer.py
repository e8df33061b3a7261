"""``PrefixTrainer``: transformers' ``Trainer`` whose checkpoints hold the prefix and not the frozen model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from fastprefix.errors import fail
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.model import dtensor, wrappers
from fastprefix.hf.storage import layer_tensors, peft_format, save_load, saved_modules
from fastprefix.hf.storage.saved_adapter import SavedAdapter
from fastprefix.hf.storage.validated_files import check_tensors
from fastprefix.prefixes import slots
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.kv import DirectKV
from fastprefix.prefixes.prefix import Prefix
from fastprefix.prefixes.prompt import SoftPrompt

_PLAIN = "transformers.Trainer saves the whole model"


class PrefixTrainer(Trainer):
    """A ``Trainer`` for a model that :func:`fastprefix.attach` was called on.

    Its checkpoints, and the files that ``save_model`` writes, are those of :func:`fastprefix.save`: a few megabytes
    that :func:`fastprefix.load` and PEFT read, with the MLP if one is trained. With several prefixes attached,
    ``default`` is saved in the folder itself, and each other prefix in a subfolder of its name. Modules of the
    configuration's ``modules_to_save``, and a classifier's trained head, are saved with the prefix. Resuming is exact:
    weights are loaded into the parameters that the optimizer holds.

    Where the losses are logged, a warning names slots of the active prefix that do no work: those that are equal, that
    have collapsed to one direction, or that have had no gradient since the last log (see ``fastprefix.analysis``).

    Raises:
        ValueError: no prefix is attached; parameters other than prefixes are trainable and would be missing in the
            checkpoints; or parameters are sharded (FSDP, DeepSpeed, tensor parallelism). The plain ``Trainer`` saves
            all parameters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The first process alone saves, and cannot gather what the others have.
        dtensor.refuse_tensor_parallel(wrappers.unwrapped(kwargs.get("model", args[0] if args else None)))
        super().__init__(*args, **kwargs)
        installation = require_installation(self.model)
        others = saved_modules.left_out(installation)
        if others:
            got = f"trainable parameters besides the prefix: {', '.join(others[:3])}"
            got += ", ..." if others[3:] else ""
            expected = "none, or their modules in the configuration's modules_to_save: checkpoints would lack them"
            raise fail("model", got, f"{expected} ({_PLAIN})")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise fail("args", "FSDP or DeepSpeed", f"unsharded parameters ({_PLAIN})")
        self.add_callback(SlotWarnings(installation))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        installation = require_installation(self.model)
        for name in installation.selection.prefixes:
            save_load.save(self.model, _folder(installation, folder, name), name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        installation = require_installation(self.model)
        for name, prefix in installation.selection.prefixes.items():
            modules = saved_modules.saved_with(installation, prefix)
            restore(prefix, _folder(installation, Path(resume_from_checkpoint), name), modules)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None:
            raise RuntimeError("no best checkpoint was saved: save and evaluate at the same steps")
        self._load_from_checkpoint(best)


class SlotWarnings(TrainerCallback):
    """Warns once of each kind of slots that do no work, in the prefix that is trained."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.silent: set[int] | None = None  # slots without a gradient in all steps since the last log; None: no step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for equal slots, which stay equal. A random encoder's are close to each other before they train."""
        self.silent = None
        self._tell(("tied",))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at a step's gradients."""
        prefix = self._prefix()
        if prefix is not None:
            found = set(slots.without_gradient(prefix))
            self.silent = found if self.silent is None else self.silent & found

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn of what was found since the last log."""
        self._tell(("tied", "collapsed", "dead"))
        self.silent = None

    def _prefix(self) -> Prefix | SoftPrompt | None:
        active = self.installation.selection.active
        return None if active is None else self.installation.selection.prefixes.get(active)

    def _tell(self, kinds: Sequence[str]) -> None:
        prefix, name = self._prefix(), self.installation.selection.active
        if prefix is None:
            return
        found = slots.complaints(prefix)
        if self.silent:
            first = ", ".join(map(str, sorted(self.silent)[:5])) + (", ..." if len(self.silent) > 5 else "")
            found["dead"] = (
                f"{len(self.silent)} of {prefix.num_virtual_tokens} slots ({first}) have had no gradient since the last"
                " log: no query attends to them. Start at other numbers, or train fewer slots"
            )
        for kind, text in ((kind, found[kind]) for kind in kinds if kind in found):
            self.installation.warn(f"slots {kind} {name}", f"fastprefix: prefix {name!r}: {text}")


def _folder(installation: Installation, folder: Path, name: str) -> Path:
    """The folder of one prefix in a checkpoint, by PEFT's rule for several adapters."""
    return folder if name == "default" or len(installation.selection.prefixes) == 1 else folder / name


@torch.no_grad()
def restore(
    prefix: Prefix | SoftPrompt, dir: str | os.PathLike[str], modules: Mapping[str, nn.Module] | None = None
) -> None:
    """Load the files that :func:`fastprefix.save` wrote of a prefix into its existing parameter objects.

    Args:
        prefix: the prefix, with the same configuration as when it was saved.
        dir: the folder that :func:`fastprefix.save` wrote.
        modules: the model's modules, by name, that were saved with the prefix; default its own ``modules_to_save``.

    Raises:
        ValueError: a file is missing or malformed, or from a prefix with another configuration; names the field.
    """
    stored = SavedAdapter(dir)
    own, path = stored.own, stored.paths[peft_format.OWN_CONFIG]
    encoder = prefix.encoder
    if own is None:
        raise fail("dir", f"no file {path}", "a folder written by fastprefix.save")
    tokens = prefix.num_virtual_tokens
    mine: dict[str, Any] = {"format_version": peft_format.FORMAT_VERSION, "num_virtual_tokens": tokens}
    if isinstance(prefix, SoftPrompt):
        mine.update(kind="prompt", projected=None if encoder is None else True)
        mine["place"] = None if prefix.config.place == "before" else prefix.config.place
    elif not isinstance(prefix.config, PrefixConfig):
        kind = next(kind for kind, config in peft_format.KINDS.items() if isinstance(prefix.config, config))
        mine.update(kind=kind, gate=prefix.config.gate)
    else:
        config = prefix.config
        mine.update(
            position_offset=config.position_offset,
            num_frozen_tokens=config.num_frozen_tokens,
            gate=config.gate,
            prefix_bias=config.prefix_bias or None,
        )
        mine["projected"] = encoder is not None
    for field, expected in mine.items():
        if own.get(field) != expected:
            raise fail(f"{path}: {field}", own.get(field), f"{expected}, the attached prefix's")
    modules = prefix.modules_to_save.named() if modules is None else modules
    saved_modules.check(stored.modules, modules, stored.paths[peft_format.WEIGHTS])
    if isinstance(prefix, SoftPrompt):
        stored.check_prompt(prefix.config, prefix.embedding.shape[1])
        saved_modules.fill(stored.modules, modules)
        return stored.fill(prefix)
    if not isinstance(prefix.config, PrefixConfig):
        stored.check_whole()
        if stored.peft["peft_type"] == layer_tensors.ADAPTION:
            stored.tensors = layer_tensors.from_adaption(stored.tensors)
        check_tensors(stored.tensors, layer_tensors.shapes(prefix), stored.paths[peft_format.WEIGHTS])
        saved_modules.fill(stored.modules, modules)
        return layer_tensors.fill(prefix, stored.tensors)
    keys, values = peft_format.stored_key_values(stored.tensors, prefix, stored.paths[peft_format.WEIGHTS])
    if encoder is not None:
        stored.check_encoder(encoder)
    stored.check_whole()
    saved_modules.fill(stored.modules, modules)
    if encoder is not None:
        return stored.fill(prefix)
    layer_tensors.fill(prefix, stored.tensors)
    for layer, key, value in zip(prefix.layers, keys, values, strict=True):
        assert isinstance(layer, DirectKV)
        frozen = layer.num_frozen_tokens
        layer.k.copy_(key[:, frozen:])
        layer.v.copy_(value[:, frozen:])
        if frozen:
            layer.frozen_k.copy_(key[:, :frozen])
            layer.frozen_v.copy_(value[:, :frozen])
