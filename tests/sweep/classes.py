"""Which classes are swept: every model that transformers exports, by the name of its class."""

from __future__ import annotations

import inspect
from typing import Any

# The order of a run: what users attach to first. Of one config's classes the others mostly add a head.
_FIRST = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "Model")


def found() -> dict[str, Any]:
    """Every class of a model that has a config, base classes left out; generative ones first."""
    import transformers

    transformers.logging.set_verbosity_error()
    classes: dict[str, Any] = {}
    for name in dir(transformers):
        if name.startswith("_") or name.endswith("PreTrainedModel"):
            continue
        try:
            cls = getattr(transformers, name)
        except Exception:  # a backend that is not installed
            continue
        if not inspect.isclass(cls) or not issubclass(cls, transformers.PreTrainedModel):
            continue
        # A second name for a class is the same class.
        if getattr(cls, "config_class", None) is not None and cls.__name__ == name:
            classes[name] = cls
    return dict(sorted(classes.items(), key=lambda item: (_rank(item[0]), item[0])))


def _rank(name: str) -> int:
    return next((i for i, suffix in enumerate(_FIRST) if name.endswith(suffix)), len(_FIRST))


def by_config(classes: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each config."""
    groups: dict[str, list[str]] = {}
    for name, cls in classes.items():
        groups.setdefault(cls.config_class.__name__, []).append(name)
    return groups
