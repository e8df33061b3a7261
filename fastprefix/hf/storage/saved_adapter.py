"""``SavedAdapter``: an adapter read from a folder, checked against a model before a prefix is made from it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprefix.errors import fail
from fastprefix.hf.adapters.build import build, empty_prefix, new_encoder, prompt_dim
from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.storage import layer_tensors, saved_modules
from fastprefix.hf.storage.atomic_folder import read_consistently
from fastprefix.hf.storage.decoder_slots import WITH_CROSS, warn_of_biases
from fastprefix.hf.storage.peft_format import (
    CONFIG,
    EMBEDDINGS,
    ENCODER,
    OWN,
    OWN_CONFIG,
    PEFT_TYPES,
    WEIGHTS,
    check_geometry,
    errors_naming,
    own_configuration,
    peft_configuration,
    stored_key_values,
)
from fastprefix.hf.storage.validated_files import check_tensors, digest, field, read_json, read_tensors, shown
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.prefixes.prefix import LayerConfig, Prefix
from fastprefix.prefixes.prompt import PromptConfig, SoftPrompt

FILES = (CONFIG, WEIGHTS, OWN_CONFIG, ENCODER)


class SavedAdapter:
    """Configuration and tensors of one save; ValueError naming path and field where a file is malformed."""

    peft: dict[str, Any]
    own: dict[str, Any] | None
    config: LayerConfig | PromptConfig
    tensors: dict[str, Tensor]
    modules: dict[str, Tensor]  # tensors of the model's modules that were saved with the prefix
    encoder: dict[str, Tensor] | None

    def __init__(self, dir: str | os.PathLike[str]) -> None:
        self.folder = Path(dir)
        read_consistently(self.folder, FILES, self._read)

    def _read(self, where: Callable[[str], Path]) -> None:
        self.paths = {name: where(name) for name in FILES}
        path, own_path = self.paths[CONFIG], self.paths[OWN_CONFIG]
        self.peft = read_json(path)
        kind = field(self.peft, "peft_type", str, path)
        # A dangling link counts as an error, not as a missing file.
        self.own = read_json(own_path) if os.path.lexists(own_path) or kind == OWN else None
        if self.own is None:
            self.config = peft_configuration(self.peft, path)
        else:
            self.config = own_configuration(self.own, own_path)
            if kind not in (*PEFT_TYPES, OWN):
                raise fail(f"{path}: peft_type", shown(kind), f"what fastprefix.save wrote beside {OWN_CONFIG}")
        tensors = read_tensors(self.paths[WEIGHTS])
        adaption = kind == layer_tensors.ADAPTION  # whose own tensors have the names of modules
        self.modules = {name: x for name, x in tensors.items() if name.startswith(saved_modules.BASE) and not adaption}
        self.tensors = {name: x for name, x in tensors.items() if name not in self.modules}
        if self._has_unread_half:
            # The second half is the decoder's, which PEFT does not read.
            tokens, found = self.config.num_virtual_tokens, self.tensors.get(EMBEDDINGS)
            if found is not None and found.dim() == 2 and len(found) == 2 * tokens:
                self.tensors = {**self.tensors, EMBEDDINGS: found[:tokens].clone()}
        listed, where_listed = (self.peft, path) if self.own is None else (self.own, own_path)
        self.trained = saved_modules.names(listed, "modules_to_save", where_listed)
        self.frozen = saved_modules.names(listed, saved_modules.FROZEN, where_listed) if self.own is not None else []
        config = self.config
        projected = config.encoder is not None if isinstance(config, PromptConfig) else config.prefix_projection
        self.encoder = read_tensors(self.paths[ENCODER]) if projected else None

    @property
    def _has_unread_half(self) -> bool:
        """Whether the weights are ``[2P, d]``: PEFT's soft prompt for an encoder and its decoder."""
        return isinstance(self.config, PromptConfig) and self.peft.get("num_transformer_submodules") == 2

    def build(self, installation: Installation) -> Prefix | SoftPrompt:
        """A new prefix for a model. All sizes in the configuration are checked before anything is allocated."""
        path = self.paths[OWN_CONFIG if self.own is not None else CONFIG]
        modules = installation.modules.matching([*self.trained, *self.frozen])
        saved_modules.check(self.modules, modules, self.paths[WEIGHTS])
        if isinstance(self.config, PromptConfig):
            if self._has_unread_half and len(installation.facts.layers.stacks) == 1:
                name = f"{self.paths[CONFIG]}: num_transformer_submodules"
                raise fail(name, 2, f"1: {type(installation.model).__name__} is no encoder-decoder")
            self.check_prompt(self.config, prompt_dim(installation))
            return self._build(installation)
        with errors_naming(path):
            empty = empty_prefix(installation, self.config)
        if not isinstance(self.config, PrefixConfig):
            return self._build_adapter(installation, empty)
        stored_key_values(self.tensors, empty, self.paths[WEIGHTS])
        if EMBEDDINGS in self.tensors:
            check_geometry(self.peft, empty, self.paths[CONFIG])
        if self.encoder is not None:
            self.check_hidden(installation)
            with torch.device("meta"):
                self.check_encoder(new_encoder(installation, empty))
        self.check_whole()
        of_peft = self.own is None and self.peft.get("num_transformer_submodules") != WITH_CROSS  # PEFT refuses those
        if of_peft and self.config.parts is not None and installation.facts.layers.main.has_position_bias:
            warn_of_biases(installation.model, stacklevel=4)
        return self._build(installation)

    def _build_adapter(self, installation: Installation, empty: Prefix) -> Prefix | SoftPrompt:
        """A new LLaMA-Adapter, ours or PEFT's."""
        self.check_whole()  # before the tensors get other names
        with errors_naming(self.paths[CONFIG]):
            if self.peft["peft_type"] == layer_tensors.ADAPTION:
                if (reason := layer_tensors.why_not_adaption(installation)) is not None:
                    raise fail("peft_type", f"{layer_tensors.ADAPTION} ({reason})", "that of a Llama or Mistral")
                self.tensors = layer_tensors.from_adaption(self.tensors)
            wanted = layer_tensors.wanted(installation, empty)
        check_tensors(self.tensors, wanted, self.paths[WEIGHTS])
        return self._build(installation)

    def _build(self, installation: Installation) -> Prefix | SoftPrompt:
        """A new prefix with the saved values, once everything was checked."""
        found = {path: name for name in (*self.frozen, *self.trained) for path in installation.modules.matching([name])}
        prefix = build(installation, self.config)
        modules = installation.modules.copies(list(found))
        prefix.modules_to_save.put(modules)
        if trained := tuple(path for path, name in found.items() if name in self.trained):
            prefix.config = dataclasses.replace(prefix.config, modules_to_save=trained)
        for path, module in modules.items():
            module.requires_grad_(path in trained)
        saved_modules.fill(self.modules, modules)
        self.fill(prefix)
        return prefix

    @torch.no_grad()
    def fill(self, prefix: Prefix | SoftPrompt) -> None:
        """Copy the saved values into a new prefix of this configuration."""
        if isinstance(prefix, Prefix):
            layer_tensors.fill(prefix, self.tensors)
            if not isinstance(prefix.config, PrefixConfig):
                return
        if prefix.encoder is not None:
            assert self.encoder is not None
            prefix.encoder.load_state_dict(self.encoder)
        elif isinstance(prefix, SoftPrompt):
            prefix.embedding.copy_(self.tensors[EMBEDDINGS])
        else:
            pairs = stored_key_values(self.tensors, prefix, self.paths[WEIGHTS])
            devices = prefix.devices()
            prefix.set_direct(*([x.float().to(d) for x, d in zip(part, devices, strict=True)] for part in pairs))

    def check_prompt(self, config: PromptConfig, dim: int) -> None:
        """Check that the weights are those of this soft prompt ``[P, d]`` and its encoder, and of one save."""
        want = {EMBEDDINGS: ("[P, d]", [config.num_virtual_tokens, dim])}
        check_tensors(self.tensors, want, self.paths[WEIGHTS])
        if self.encoder is not None:
            hidden = config.encoder_hidden_size or dim
            if config.encoder == "lstm":
                layers = len([n for n in self.encoder if re.fullmatch(r"lstm_head\.weight_hh_l\d+", n)])
                if layers != config.encoder_num_layers:
                    expected = f"encoder_num_layers = {config.encoder_num_layers}"
                    raise fail(str(self.paths[ENCODER]), f"an LSTM of {layers} layers", expected)
                sizes = [4 * hidden, hidden]
                self._check_size("lstm_head.weight_hh_l0", "[4 * encoder_hidden_size, encoder_hidden_size]", sizes)
            else:
                self._check_size("mlp_head.0.weight", "[encoder_hidden_size, d]", [hidden, dim])
            with torch.device("meta"):
                self.check_encoder(config.new_encoder(dim))
        self.check_whole()

    def check_hidden(self, installation: Installation) -> None:
        """Check that the MLP has the width of the configuration."""
        assert isinstance(self.config, PrefixConfig) and self.encoder is not None
        hidden = self.config.encoder_hidden_size or installation.model.config.get_text_config().hidden_size
        names = [name for name in self.encoder if name.endswith("down.bias")] or ["down.bias"]
        for name in names:
            self._check_size(name, "[encoder_hidden_size]", [hidden])

    def _check_size(self, name: str, dims: str, sizes: list[int]) -> None:
        """Check a tensor of the MLP or encoder against the configuration, by which the other tensors are allocated."""
        assert self.encoder is not None
        x = self.encoder.get(name)
        if x is None or list(x.shape) != sizes:
            got = "no such tensor" if x is None else f"shape {list(x.shape)}"
            raise fail(f"{self.paths[ENCODER]}: {name}", got, f"{dims} = {sizes}")

    def check_encoder(self, encoder: nn.Module) -> None:
        """Check that the MLP's weights have the shapes of this encoder's."""
        assert self.encoder is not None
        want = {name: ("shape", list(x.shape)) for name, x in encoder.state_dict().items()}
        check_tensors(self.encoder, want, self.paths[ENCODER])

    def check_whole(self) -> None:
        """Check that all files are from one save: PEFT, for example, may have overwritten the weights alone."""
        if self.own is None:
            return
        path, tokens = self.paths[CONFIG], self.config.num_virtual_tokens
        name = "adapter_len" if self.peft["peft_type"] == layer_tensors.ADAPTION else "num_virtual_tokens"
        if field(self.peft, name, int, path) != tokens:
            raise fail(f"{path}: {name}", shown(self.peft[name]), f"{tokens} as in {OWN_CONFIG}")
        stamps = ((WEIGHTS, "weights", {**self.tensors, **self.modules}), (ENCODER, "encoder_weights", self.encoder))
        for name, stamp, tensors in stamps:
            # Older folders have no hash.
            if tensors is not None and self.own.get(stamp) not in (None, digest(tensors)):
                expected = f"those of {OWN_CONFIG} (delete it, and {ENCODER}, to load PEFT's)"
                raise fail(str(self.paths[name]), "weights that were replaced since", expected)
