"""The classes of patched PeftModels. Patching changes a model's class, not its attributes, so it can be pickled."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastprefix.hf.adapters.installation import Installation
from fastprefix.hf.adapters.lookup import require_installation
from fastprefix.hf.peft import prompts, resume
from fastprefix.hf.peft.adapters import Adapters, task
from fastprefix.hf.peft.checks import break_symmetry, check
from fastprefix.hf.peft.mixins import PatchedAdaption
from fastprefix.hf.runtime.exactness import why_not_shareable
from fastprefix.hf.storage.atomic_folder import complete_interrupted_save

SHARING, ADAPTION = "FastPrefix", "FastPrefixAdaption"


class Patched:
    """Mixed into the class of a PeftModel with prefixes or soft prompts."""

    peft_config: dict[str, Any]
    base_model: Any
    _adapters_disabled: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward, with support for ``adapter_names`` (one for each row) and for the caller's own cache."""
        kwargs = _bind(self, args, kwargs)
        names, tasks = kwargs.pop("adapter_names", None), kwargs.pop("task_ids", None)
        installation, adapters = _parts(self)
        selection = installation.selection
        if self._adapters_disabled:
            return self.base_model(**kwargs)
        chosen = adapters.choose(names, tasks)
        selected = chosen or selection.current()
        prompted = selected is not None and any(adapters.resolve(n).prompt is not None for n in selected.distinct())
        prompted = prompted and not adapters.two_stacks  # there the prompt is the encoder's, and logits the decoder's
        if prompted and names is None and selection.chosen is None and selection.shared is None:
            reason = _concatenates(self, installation, selected, kwargs)
            if reason is not None:
                return _theirs("forward", self, adapters, reason, task_ids=tasks, **kwargs)
        _token_types(self, kwargs)
        mixed = chosen or selection.chosen or prompted or adapters.two_stacks
        with _chosen(installation, chosen), _shifted(adapters, mixed, kwargs):
            if prompted and names is None and selected is not None and selection.chosen in (None, chosen):
                return prompts.forward(self, installation, selected, kwargs)
            return self.base_model(**kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's generate, with support for ``adapter_names``, an earlier call's cache, static caches and no cache."""
        names, tasks = kwargs.pop("adapter_names", None), kwargs.pop("task_ids", None)
        installation, adapters = _parts(self)
        chosen = None if self._adapters_disabled else adapters.choose(names, tasks)
        selected = chosen or installation.selection.current()
        entries = [] if selected is None else [adapters.resolve(name) for name in selected.distinct()]
        tokens = max((entry.tokens for entry in entries if entry.prompt is not None), default=0)
        alone = names is None and installation.selection.chosen is None and installation.selection.shared is None
        alone = alone and not adapters.two_stacks
        reason = prompts.outgrows(self, installation, tokens, args, kwargs) if tokens and alone else None
        if reason is not None:
            if tasks is not None:
                kwargs["task_ids"] = tasks
            return _theirs("generate", self, adapters, reason, *args, **kwargs)
        with _chosen(installation, chosen):
            return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's disable_adapter. Inside the block the base model reads no adapter, also when it is called directly.

        Trained heads stay in use.
        """
        outside, self._adapters_disabled = self._adapters_disabled, True
        try:
            yield
        finally:
            self._adapters_disabled = outside

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """PEFT's add_adapter, which works while gradient checkpointing is on, too."""
        _, adapters = _parts(self)
        with _checkpointing_off(self.base_model):
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)  # type: ignore[misc]
        try:
            check(adapters, adapter_name)
        except ValueError:
            self.delete_adapter(adapter_name)  # type: ignore[attr-defined]
            raise
        break_symmetry(self, adapter_name)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write PEFT's files, and next to them the encoders that are trained, so that training can resume."""
        complete_interrupted_save(Path(save_directory))  # a killed save's files are older than these
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            resume.save(self, save_directory, kwargs.get("selected_adapters"))

    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """PEFT's load_adapter, which resumes training (``is_trainable=True``) with the encoder that was trained."""
        trained = adapter_name in self.peft_config and not self.peft_config[adapter_name].inference_mode
        if is_trainable or trained:
            return resume.load(self, model_id, adapter_name, is_trainable, **kwargs)
        return super().load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)  # type: ignore[misc]


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return Patched.forward(self, *args, **kwargs)


@functools.cache
def patched(cls: Any, start: str) -> Any:
    """The patched subclass of a PEFT class; ``start`` is the start of its name and selects the mixin."""
    members: dict[str, Any] = {"__module__": __name__, "__doc__": cls.__doc__}
    if start == SHARING:
        # Read here, as torch.compile cannot trace inspect, and set on forward for callers that ask for argument names.
        signature = inspect.signature(cls.forward)
        members["_arguments"] = tuple(signature.parameters)[1:]
        members["forward"] = types.FunctionType(_forward.__code__, _forward.__globals__, "forward")
        members["forward"].__signature__ = signature
    return type(start + cls.__name__, (MIXINS[start], cls), members)


MIXINS = {ADAPTION: PatchedAdaption, SHARING: Patched}


def __getattr__(name: str) -> Any:
    # Pickle looks the classes that ``patched`` makes up by their names in this module.
    import peft

    for start in MIXINS:
        if name.startswith(start) and hasattr(peft, name.removeprefix(start)):
            return patched(getattr(peft, name.removeprefix(start)), start)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def peft_class(model: Any) -> Any:
    """PEFT's own class of a patched model."""
    return type(model).__bases__[1]


def _parts(model: Any) -> tuple[Installation, Adapters]:
    installation = require_installation(model)
    assert isinstance(installation.selection.provider, Adapters)
    return installation, installation.selection.provider


def _bind(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by PEFT's names, without those that are None, which not every model accepts."""
    given = {**dict(zip(model._arguments, args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def _chosen(installation: Installation, selected: Any) -> Iterator[None]:
    if selected is None:
        yield
        return
    with installation.lock.block():
        installation.configs.switch(on=True)
        with installation.selection.choosing(selected):
            yield


def _concatenates(model: Any, installation: Installation, selected: Any, kwargs: dict[str, Any]) -> str | None:
    """The reason why a soft prompt is left to PEFT, which concatenates it; None where it is shared."""
    if task(model) == "QUESTION_ANS":
        return "a question-answering head has its softmax over the prompt's positions too"
    if not installation.facts.loss_fits_mask and "labels" in kwargs and kwargs.get("attention_mask") is not None:
        return "its loss reads the mask beside the labels, which a shared prompt makes one place longer"
    tokens = max(installation.selection.provider.resolve(name).tokens for name in selected.distinct())
    # PEFT's forward has no cache: a generation that outgrows a window is caught when the prefix is read.
    return why_not_shareable(installation.facts, tokens, {**kwargs, "past_key_values": None})


def _theirs(method: str, model: Any, adapters: Adapters, reason: str, *args: Any, **kwargs: Any) -> Any:
    """Call PEFT's own forward or generate, which concatenates the prompt."""
    adapters.installation.warn.concatenation(reason)
    adapters.bypassed = True
    try:
        return getattr(peft_class(model), method)(model, *args, **kwargs)
    finally:
        adapters.bypassed = False


def _token_types(model: Any, kwargs: dict[str, Any]) -> None:
    """Drop ``token_type_ids`` with a warning for the tasks for which PEFT does."""
    if task(model) in ("CAUSAL_LM", "FEATURE_EXTRACTION") and "token_type_ids" in kwargs:
        message = "Token type ids are not supported for parameter efficient tuning. Ignoring token type ids"
        warnings.warn(message, stacklevel=3)
        del kwargs["token_type_ids"]


@contextmanager
def _shifted(adapters: Adapters, mixed: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Shift the caller's position ids past the prefix, as PEFT does for a single active prefix."""
    active = adapters.active()
    if mixed or active is None or "position_ids" not in kwargs:
        yield
        return
    kwargs["position_ids"] = kwargs["position_ids"] + adapters.resolve(active.names[0]).tokens
    adapters.shifted = True
    try:
        yield
    finally:
        adapters.shifted = False


@contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off inside the block, as PEFT refuses to add a prefix while it is on."""
    modules: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True
