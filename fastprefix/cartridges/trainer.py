"""Training of cartridges with transformers' Trainer: the distillation loss, distractors, a deadline and progress."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from fastprefix.cartridges.batches import predictions
from fastprefix.cartridges.config import CartridgeConfig
from fastprefix.cartridges.measure import Name, measure, reads
from fastprefix.cartridges.targets import Targets, distillation_loss
from fastprefix.errors import fail
from fastprefix.hf.trainer import PrefixTrainer

# What a run leaves in its folder first; with given conversations the second alone.
FIRST_FILE, FIRST_TARGETS = "conversations_0.jsonl", "targets_0.safetensors"


class CartridgeTrainer(PrefixTrainer):
    """A :class:`PrefixTrainer` whose loss is the divergence from the model that reads the whole text.

    Args:
        names: the attached cartridges, one for each document; None for a single one, which is active.
        distractors: how likely a row reads another document's cartridge too, in front of its own or behind it, so that
            cartridges can be composed afterwards (Cartridges at Scale, arXiv:2606.04557).
        packed: whether batches are packed.

    ``train_dataset`` and ``eval_dataset`` are lists of examples with targets.
    """

    control: Any  # the Trainer's own, whose type mypy does not see

    def __init__(
        self,
        *args: Any,
        names: Sequence[str] | None,
        distractors: float,
        packed: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.names, self.distractors, self.packed = names, distractors, packed

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The mean divergence of a batch's trained tokens."""
        rows = self._with_distractors(inputs["documents"])
        with reads(self.model, rows, range(len(inputs["documents"])), self.packed):
            logits = predictions(model, inputs)
            return distillation_loss(logits, Targets(**inputs["targets"])).mean()

    def _with_distractors(self, documents: Sequence[int]) -> list[Name] | None:
        """The names that each row reads. Drawn from torch's random state, which checkpoints hold."""
        if self.names is None:
            return None
        found: list[Name] = []
        for document in documents:
            own = self.names[document]
            if float(torch.rand(())) >= self.distractors:
                found.append(own)
                continue
            other = self.names[(document + 1 + int(torch.randint(len(self.names) - 1, ()))) % len(self.names)]
            found.append((own, other) if float(torch.rand(())) < 0.5 else (other, own))
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out examples, each with the cartridge of its document alone."""
        found = measure(self.model, self.eval_dataset, self.args.per_device_eval_batch_size, self.packed, self.names)
        metrics = {f"eval_{name}": number for name, number in found.fields().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class LastStep(TrainerCallback):
    """Measure and save at the last step, which is that in which a time has come, if there is one."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline  # of time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            control.should_training_stop = True
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_save = control.should_evaluate = True


def training_arguments(folder: Path, config: CartridgeConfig) -> TrainingArguments:
    """The Trainer's options: AdamW, a rate that falls linearly, and checkpoints where the held-out part is measured."""
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=config.lr,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        seed=config.seed,
        logging_steps=min(5, config.eval_steps),
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_divergence",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=config.patience is not None,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def found_checkpoint(folder: Path, resume: bool) -> str | None:
    """The checkpoint to go on from; None where there is none yet.

    Raises:
        ValueError: an earlier run's files are there and ``resume`` was not asked for, or it was and there are none.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    begun = last is not None or (folder / FIRST_FILE).is_file() or (folder / FIRST_TARGETS).is_file()
    if resume and not begun:
        raise fail("resume", f"nothing of an earlier run in {folder}", "the folder of an interrupted run")
    if begun and not resume:
        raise fail("output", f"{folder}, with an earlier run", "resume, to go on with it, or another folder")
    return last
