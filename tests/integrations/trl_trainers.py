"""TRL's trainers of groups and pairs on a tiny model, with ``share_prompts`` and without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

import fastprefix
from tests.support.tiny_models import COLOURS, save_tiny, tiny_tokenizer

STEPS, GENERATIONS = 3, 4
QUIET: dict[str, Any] = {
    "max_steps": STEPS,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
OPTIONS: dict[str, Any] = {**QUIET, "per_device_train_batch_size": 8, "learning_rate": 0.01, "seed": 3}
# A few words in front, so that there is something to share; of different lengths, so that they are padded.
QUESTIONS = ["the colour of " * (1 + i % 3) + f"{thing} is" for i, thing in enumerate(itertools.islice(COLOURS, 4))]
UNTOLD = ("time", "runtime", "per_second")


class Trainer(GRPOTrainer):
    """What ``share_prompts`` looks at of a trainer, without a dataset."""

    def __init__(self, model: Any) -> None:
        self.model, self.ref_model = model, None


def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.padding_side = "left"
    return made


def distinct_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def grpo(model: Any, folder: Path, **options: Any) -> Any:
    given = {"num_generations": GENERATIONS, "max_completion_length": 6, "beta": 0.1, **OPTIONS}
    cls, config = (RLOOTrainer, RLOOConfig) if options.pop("rloo", False) else (GRPOTrainer, GRPOConfig)
    peft_config = options.pop("peft_config", None)
    return cls(
        model=model,
        reward_funcs=distinct_words,
        args=config(str(folder / "out"), **{**given, **options}),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in QUESTIONS]),
        eval_dataset=datasets.Dataset.from_list([{"prompt": text} for text in QUESTIONS[:2]]),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def preference_rows() -> list[dict[str, Any]]:
    answers = list(COLOURS.values())
    return [
        {"prompt": text, "chosen": f" {answers[i]} {answers[2]}", "rejected": f" {answers[i + 1]}"}
        for i, text in enumerate(QUESTIONS)
    ]


def dpo(model: Any, folder: Path, **options: Any) -> Any:
    peft_config = options.pop("peft_config", None)
    return DPOTrainer(
        model=model,
        args=DPOConfig(str(folder / "out"), **{**OPTIONS, "max_length": None, "beta": 0.3, **options}),
        train_dataset=datasets.Dataset.from_list(preference_rows()),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def kto(model: Any, folder: Path, **options: Any) -> Any:
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in preference_rows()
        for kind in ("chosen", "rejected")
    ]
    return KTOTrainer(
        model=model,
        args=KTOConfig(str(folder / "out"), **{**OPTIONS, "max_length": None, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def trained(make: Callable[..., Any], folder: Path, share: bool, model: Any = None, **options: Any) -> tuple[Any, Any]:
    """A trainer that has trained, and what ``share_prompts`` returned."""
    torch.manual_seed(0)
    options = {**options}
    if "peft_config" in options:
        options["peft_config"] = options["peft_config"]()
    # From a folder, as TRL reads the reference model from where the model was read.
    if not (folder / "model").exists():
        save_tiny(folder / "model") if model is None else model.save_pretrained(folder / "model")
    trainer = make(AutoModelForCausalLM.from_pretrained(folder / "model"), folder, **options)
    sharing = fastprefix.share_prompts(trainer) if share else None
    trainer.train()
    return trainer, sharing


def logged(trainer: Any) -> list[dict[str, Any]]:
    entries = [e for e in trainer.state.log_history if "loss" in e]
    return [{k: v for k, v in e.items() if not any(word in k for word in UNTOLD)} for e in entries]


def assert_same(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    """The same metrics in every step, and the same weights in the end."""
    for a, b in zip(logged(got), logged(want), strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    for p, q in zip(got.model.parameters(), want.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=10 * tolerance, atol=tolerance)
