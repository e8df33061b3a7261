"""PEFT's models as shipped against the same models patched, in training steps and generation; and mixed batches.

Needs peft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastprefix
from fastprefix.measure.training.compare_steps import share_weights
from fastprefix.measure.training.saved_bytes import saved_bytes

PEFT, PATCHED, ATTACHED, FROZEN = "peft", "patched", "attached", "no prefix"


@dataclass
class Workload:
    """A workload to time: the forward and backward of a training step, or a generation."""

    model: Any
    forward: Callable[[], Any]  # returns the loss, or the generated ids

    def __call__(self) -> None:
        result = self.forward()
        if isinstance(result, Tensor) and result.requires_grad:
            self.model.zero_grad(set_to_none=True)
            result.backward()

    def saved_bytes(self) -> int:
        """The bytes that the forward saves for its backward, without parameters."""
        return saved_bytes(self.forward, exclude=self.model.parameters())


def peft_models(model: nn.Module, config: Any) -> dict[str, Any]:
    """A PEFT model and the same model patched, with equal prompt parameters on shared weights."""
    from peft import get_peft_model

    torch.manual_seed(0)
    made: Any = get_peft_model(share_weights(model), config)
    patched = share_weights(made)
    fastprefix.patch(patched)
    return {PEFT: made, PATCHED: patched}


def prefix_steps(model: nn.Module, ids: Tensor, num_virtual_tokens: int) -> dict[str, Workload]:
    """Training steps of PREFIX_TUNING; ``ids`` ``[B, S]`` are the labels too."""
    from peft import PrefixTuningConfig

    models = peft_models(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens))
    return _steps(models, ids)


def prompt_steps(model: nn.Module, ids: Tensor, num_virtual_tokens: int) -> dict[str, Workload]:
    """Training steps of PROMPT_TUNING, and of an attached soft prompt with the same values."""
    from peft import PromptTuningConfig

    models = peft_models(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens))
    mine: Any = share_weights(model)
    prompt = fastprefix.attach(mine, fastprefix.PromptConfig(num_virtual_tokens))
    with torch.no_grad():
        prompt.embedding.copy_(models[PEFT].prompt_encoder["default"].embedding.weight)
    return _steps({**models, ATTACHED: mine}, ids)


def generations(model: nn.Module, ids: Tensor, num_virtual_tokens: int, new_tokens: int) -> dict[str, Workload]:
    """Greedy generation of ``new_tokens`` after ``ids`` ``[B, S]``: a PREFIX_TUNING prefix, ours, and none."""
    from peft import PrefixTuningConfig

    models = peft_models(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens))
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run(mine: Any) -> Workload:
        mine.eval()
        mask = torch.ones_like(ids)
        return Workload(mine, lambda: mine.generate(input_ids=ids, attention_mask=mask, **options))

    attached: Any = share_weights(model)
    fastprefix.attach(attached, fastprefix.PrefixConfig(num_virtual_tokens))
    runs = {name: run(mine) for name, mine in {**models, ATTACHED: attached, FROZEN: share_weights(model)}.items()}
    first, second = (runs[name].forward() for name in (PEFT, PATCHED))
    if not torch.equal(first, second):
        raise AssertionError("a patched model generates something else")
    return runs


def mixed_steps(model: nn.Module, ids: Tensor, num_virtual_tokens: int) -> dict[str, Workload]:
    """Training steps with one prefix for all ``B`` rows, and with a different prefix for each row."""
    runs = {}
    for name, count in (("one", 1), ("mixed", len(ids))):
        mine: Any = share_weights(model)
        for i in range(count):
            fastprefix.attach(mine, fastprefix.PrefixConfig(num_virtual_tokens), f"p{i}")
        names = [f"p{i % count}" for i in range(len(ids))]

        def forward(mine: Any = mine, names: list[str | None] = names) -> Any:  # type: ignore[assignment]
            with fastprefix.prefix_batch(mine, names):
                return mine(input_ids=ids, labels=ids, use_cache=False).loss

        runs[name] = Workload(mine.train(), forward)
    return runs


def _steps(models: dict[str, Any], ids: Tensor) -> dict[str, Workload]:
    runs = {}
    for name, mine in models.items():
        mine.train()
        mask = torch.ones_like(ids)

        def forward(mine: Any = mine, mask: Tensor = mask) -> Any:
            return mine(input_ids=ids, attention_mask=mask, labels=ids).loss

        runs[name] = Workload(mine, forward)
    with torch.no_grad():
        want = runs[PEFT].forward().item()
        for name, run in runs.items():
            got = run.forward().item()
            if not abs(got - want) <= 1e-4 * max(1.0, abs(want)):  # so written that nan fails
                raise AssertionError(f"{name}: loss {got}, not {want} as PEFT's")
    return runs
