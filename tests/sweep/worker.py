"""A process that checks class after class: names in, one JSON line a class out; its owner ends it when it hangs."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from typing import Any

import torch

MEMORY = 6 << 30


def check(name: str) -> dict[str, Any]:
    """Every check of one class."""
    import transformers

    from tests.sweep.models.build import NotBuilt, build
    from tests.sweep.models.classes import class_name
    from tests.sweep.models.overrides import VARIANTS
    from tests.sweep.outcome import line

    cls = getattr(transformers, class_name(name))
    found: dict[str, Any] = {"class": name, "config": cls.config_class.__name__, "checks": {}}
    begun = time.monotonic()
    try:
        bare = build(cls, VARIANTS.get(name))
    except NotBuilt as reason:
        found["not built"] = str(reason)
        return found
    found["interface"] = bool(bare._can_set_attn_implementation())
    try:
        found.update(_checks(bare))
    except Exception as error:
        found["not run"] = line(error)
    found["seconds"] = round(time.monotonic() - begun, 1)
    return found


def _checks(bare: Any) -> dict[str, Any]:
    import peft

    from fastprefix import PrefixConfig, PromptConfig
    from tests.sweep import checks, outcome, peft_checks, running
    from tests.sweep.models import inputs

    try:
        cases = inputs.cases(bare)
    except Exception as error:
        # What cannot be run can still be refused, if not because it cannot be run.
        refusals = {}
        for kind, config in (("prefix", PrefixConfig(4)), ("prompt", PromptConfig(4))):
            try:
                running.attached(bare, config)
            except running.Refused as refusal:
                if "does not run on" in str(refusal):
                    raise error from None
                refusals[kind] = outcome.Outcome(outcome.REFUSED, str(refusal)).plain()
        if len(refusals) == 2:
            return {"checks": refusals, "cases": []}
        raise
    own = checks.own_differences(bare, cases)
    results = {"prefix": checks.prefix(bare, cases), "prompt": checks.prompt(bare, cases)}
    for kind, config in (("peft prefix", peft.PrefixTuningConfig), ("peft prompt", peft.PromptTuningConfig)):
        results[kind] = peft_checks.patched(bare, cases[0], config, results[kind.removeprefix("peft ")])
    return {"checks": {k: v.plain() for k, v in results.items()}, "cases": [case.name for case in cases], "own": own}


def main() -> None:
    """Read names from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print goes elsewhere
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    import transformers

    from tests.sweep.precision import Fp64

    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        with Fp64():
            found = check(line.strip())
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
