"""Saves and loads the encoders of PEFT adapters, so that training can resume; PEFT saves only an encoder's output."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from fastprefix.errors import fail
from fastprefix.hf.storage.atomic_folder import complete_interrupted_save, write_atomically
from fastprefix.hf.storage.peft_format import PREFIX_TYPES
from fastprefix.hf.storage.validated_files import read_tensors, write_tensors

FILE = "prompt_encoder.safetensors"


def reparameterised(config: Any) -> bool:
    """Whether an adapter is trained through an encoder, of which PEFT saves only the output."""
    return bool(getattr(config, "prefix_projection", False)) or config.peft_type == "P_TUNING"


def save(model: Any, dir: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
    """Write the trained encoders next to PEFT's files, each file replaced atomically."""
    for name in model.peft_config if names is None else names:
        config = model.peft_config[name]
        folder = Path(dir) if name == "default" else Path(dir) / name
        if not reparameterised(config) or config.inference_mode:
            (folder / FILE).unlink(missing_ok=True)
            continue
        state_dict = model.prompt_encoder[name].state_dict()
        tensors = {key: x.detach().cpu().contiguous() for key, x in state_dict.items()}
        write_atomically(folder, {FILE: functools.partial(write_tensors, tensors)})


def load(model: Any, dir: Any, name: str, is_trainable: bool, **kwargs: Any) -> Any:
    """PEFT's ``load_adapter`` for an adapter that is to be trained, with its encoder.

    Raises:
        ValueError: the adapter was trained through an encoder that was not saved, or one of another shape.
    """
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    subfolder = kwargs.get("subfolder")
    folder = Path(dir) / subfolder if subfolder else Path(dir)
    saved = PeftConfig.from_pretrained(dir, **({"subfolder": subfolder} if subfolder else {}))
    submodules = saved.num_transformer_submodules
    if name not in model.peft_config:
        saved.inference_mode = False
        model.add_adapter(name, saved)
    if saved.peft_type in PREFIX_TYPES:
        # In an encoder-decoder this tells whether slots of cross-attention were trained.
        model.peft_config[name].num_transformer_submodules = submodules
    config, encoder = model.peft_config[name], model.prompt_encoder[name]
    weights = load_peft_weights(dir, device="cpu", **({"subfolder": subfolder} if subfolder else {}))
    if not reparameterised(config):
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    else:
        complete_interrupted_save(folder)
        if not (folder / FILE).exists():
            expected = "the encoder that training goes on with (written by a patched model's save_pretrained)"
            raise fail("model_id", f"no file {folder / FILE}", expected)
        tensors = read_tensors(folder / FILE)
        for key, x in encoder.state_dict().items():
            if key not in tensors or tensors[key].shape != x.shape:
                got = f"shape {list(tensors[key].shape)}" if key in tensors else "no such tensor"
                raise fail(f"{folder / FILE}: {key}", got, f"shape {list(x.shape)}")
        # PEFT would copy the encoder's output into its parameters, which has no inverse.
        with mock.patch.object(type(encoder), "_load_adapter_state_dict", lambda self, state_dict: None):
            result = set_peft_model_state_dict(model, weights, adapter_name=name)
        encoder.load_state_dict(tensors)
    # Report missing keys of the adapter alone, not of the base model or of the encoder, which was loaded above.
    result.missing_keys[:] = [key for key in result.missing_keys if name in key and "prompt_encoder." not in key]
    if not is_trainable:
        model.eval()
    return result
