"""Which of PEFT's tests concern the methods that ``fastprefix.patch`` accelerates, and what is left out and why."""

from __future__ import annotations

import inspect
import re
from typing import Any

from tests.peft_suite import models
from tests.peft_suite.source import HUB_NAME

CONFIGS = (
    "PrefixTuningConfig",
    "CartridgeConfig",
    "PromptTuningConfig",
    "PromptEncoderConfig",
    "MultitaskPromptTuningConfig",
    "AdaptionPromptConfig",
)
# test_cpt.py is not here: CPT is not accelerated.
FILES = (
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_feature_extraction_models.py",
    "test_vision_models.py",
    "test_cartridge.py",
    "test_initialization.py",
    "test_adaption_prompt.py",
    "test_multitask_prompt_tuning.py",
)
WHOLE = ("test_cartridge.py", "test_adaption_prompt.py", "test_multitask_prompt_tuning.py")
_NAMED = re.compile("|".join((*CONFIGS, "prefix_tuning", "prompt_learning", "prompt_tuning", "cartridge")))


def configs(item: Any) -> set[str]:
    """The names of the PEFT configs, classes or instances, that the test is parametrised with."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    kinds = {value if isinstance(value, type) else type(value) for value in values}
    return {kind.__name__ for kind in kinds if any(base.__name__ == "PeftConfig" for base in kind.__mro__)}


def selected(item: Any) -> bool:
    """By the config it is parametrised with; else by its module, its name or what its body names."""
    if found := configs(item):
        return not found.isdisjoint(CONFIGS)
    return item.path.name in WHOLE or bool(_NAMED.search(item.originalname + inspect.getsource(item.function)))


def cannot_run(item: Any) -> str | None:
    """Why a selected test cannot be run here, or None: it asks for a model that nothing stands in for."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    asked = [value for value in values if isinstance(value, str) and HUB_NAME.fullmatch(f'"{value}"')]
    asked += HUB_NAME.findall(inspect.getsource(item.function))
    missing = sorted({name for name in asked if models.architecture(name) is None})
    return f"no local model stands in for {', '.join(missing)}" if missing else None
