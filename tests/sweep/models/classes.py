"""Which classes are swept: every model that transformers exports, by the name of its class, and some variants."""

from __future__ import annotations

import inspect
import re
from typing import Any

from tests.sweep.models.overrides import VARIANTS

# The order of a run: what users attach to first. Of one config's classes the others mostly add a head.
_FIRST = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "Model")


def found() -> dict[str, Any]:
    """Every class of a model that has a config, base classes left out; generative ones first."""
    import transformers

    transformers.logging.set_verbosity_error()
    classes: dict[str, Any] = {}
    for name in dir(transformers):
        if name.startswith("_") or re.search(r"(?i)pretrained(model|\w+encoder|reader)", name):
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
    for name in VARIANTS:
        classes[name] = classes[class_name(name)]
    return dict(sorted(classes.items(), key=lambda item: (_rank(item[0]), item[0])))


def class_name(name: str) -> str:
    """The class that a name of a variant starts with."""
    return name.split(",")[0]


def _rank(name: str) -> int:
    return next((i for i, suffix in enumerate(_FIRST) if class_name(name).endswith(suffix)), len(_FIRST))
