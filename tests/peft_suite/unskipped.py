"""PEFT's skips for its own limits, lifted: the tests run, and are counted apart from those PEFT runs itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Each limit, and how "name of the test: reason" reads where PEFT skips for it. Not lifted: what has no meaning for a
# prompt (merging it into weights, casting tuner layers, layers_to_transform, weighted sums of LoRA), and tests that do
# not apply to the config. Prompts that are tokens differ in length from a row without one: they cannot be mixed.
LIMITS = {
    "gradient checkpointing with prefix tuning": r"Prefix Tuning does not support gradient checkpointing",
    "training BERT and its kin with prefix tuning": r"Prefix tuning fails with Bert\* type models",
    "DeBERTa with prefix tuning": r"DeBERTa with PrefixTuning does not work|Skip tests that use prefix\w+ for Deberta",
    "prompt methods on GPT-2's Conv1D": r"This PEFT method does not support Conv1D layers",
    "disabling a prompt of an encoder-decoder": r"does not work with disabling adapters",
    "batches that mix adapters": r"test_mixed_adapter.*: Mixed adapter .* for (this config|.*PrefixTuningConfig)",
}
CHECKPOINTED = "checkpointing enabled before the adapter"
_REFUSES = "test_prompt_learning_with_gradient_checkpointing"
_COUNTERPART = "test_prompt_learning_then_gradient_checkpointing"
_REFUSED = ("PrefixTuningConfig", "CartridgeConfig")
_running = ""  # the test, and what was lifted for it
_lifted: list[str] = []
_skip = pytest.skip


def install() -> None:
    """Replaces ``pytest.skip``, which the tests look up on the module."""
    _skip_unless_lifted.Exception = _skip.Exception
    pytest.skip = _skip_unless_lifted


def limit(said: str) -> str | None:
    """The limit that ``"test: reason"`` names, if it is one of those lifted."""
    return next((name for name, pattern in LIMITS.items() if re.search(pattern, said)), None)


def _skip_unless_lifted(reason: str = "", **options: Any) -> None:
    if (name := limit(f"{_running}: {reason}")) is None:
        _skip(reason, **options)
    elif name not in _lifted:
        _lifted.append(name)


def add_counterpart(cls: type) -> None:
    """A second name for the test that expects PEFT to refuse checkpointing, under which it trains instead.

    That test enables checkpointing, expects ``get_peft_model`` to raise for prefix tuning and cartridges, and returns.
    PEFT's constructor raises before there is a model to patch, so what follows in its body, training with the Trainer
    and checkpointing, is run with the order turned: the adapter first, then checkpointing and what PEFT's constructor
    does about it. Without the patch PEFT then fails in the forward pass.
    """
    if hasattr(cls, _REFUSES):
        setattr(cls, _COUNTERPART, getattr(cls, _REFUSES))


def is_counterpart(name: str) -> bool:
    """By the name of the test."""
    return _COUNTERPART in name


def redundant(item: Any) -> bool:
    """A counterpart to what PEFT does not refuse: the test itself trains."""
    return is_counterpart(item.name) and item.callspec.params["config_cls"].__name__ not in _REFUSED


@contextlib.contextmanager
def running(item: Any) -> Iterator[list[str]]:
    """The limits that are lifted while the test runs."""
    global _running, _lifted
    _running, _lifted = item.name, []
    with pytest.MonkeyPatch.context() as patch:
        if is_counterpart(item.name):
            _lifted.append(CHECKPOINTED)
            patch.setattr(item.module, "get_peft_model", _checkpointed_after(item.module.get_peft_model))
        yield _lifted


def _checkpointed_after(get_peft_model: Callable[..., Any]) -> Callable[..., Any]:
    def get(model: Any, *args: Any, **kwargs: Any) -> Any:
        model.gradient_checkpointing_disable()
        made = get_peft_model(model, *args, **kwargs)
        model.gradient_checkpointing_enable()
        made.prepare_model_for_gradient_checkpointing(model)
        return made

    return get
