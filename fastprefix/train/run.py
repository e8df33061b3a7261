"""Train a prefix with transformers' Trainer, and show at the end what training changed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

import fastprefix
from fastprefix.data import Data, Row, collator
from fastprefix.hf.storage.peft_format import CONFIG
from fastprefix.hf.trainer import PrefixTrainer
from fastprefix.models import Found, load_model, load_tokenizer
from fastprefix.train import plot, sample
from fastprefix.train.checkpointing import checkpoint_layers
from fastprefix.train.initialization import choose_initialization
from fastprefix.train.progress import Progress


def run_training(options: argparse.Namespace, found: Found, data: Data, heldout: Data | None) -> int:
    """Train with options that ``fastprefix train`` has checked already; returns 0, the exit status."""
    checkpoint = _checkpoint(options)
    tokenizer = load_tokenizer(found)
    rows = data.encode(tokenizer, options.max_length)
    heldout_rows = None if heldout is None else heldout.encode(tokenizer, options.max_length)
    initialization = choose_initialization(options, tokenizer, rows)
    print(f"{data.path}: {data.about}; reading {found.name} ...", flush=True)
    model = load_model(found, torch.bfloat16 if options.bf16 else torch.float32)
    torch.manual_seed(options.seed)
    prefix = _attach(model, initialization.config, options)
    if options.gradient_checkpointing:
        checkpoint_layers(model)
    if options.save_start is not None and checkpoint is None:
        fastprefix.save(model, options.save_start)
    print(initialization.about if checkpoint is None else f"going on from {checkpoint}")
    trained = sum(p.numel() for p in prefix.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"{trained:,} parameters trained, {frozen:,} frozen", flush=True)
    trainer = _trainer(options, model, tokenizer, rows, heldout_rows)
    example, examples = (rows[0], data) if heldout is None or heldout_rows is None else (heldout_rows[0], heldout)
    before = sample.complete_example(model, tokenizer, example, with_prefix=False)
    history = []  # a Trainer drops what was logged before training
    if heldout is not None and checkpoint is None:
        history = [{"step": 0, "eval_loss": trainer.evaluate()["eval_loss"]}]
        print(f"held-out loss before: {history[0]['eval_loss']:.4f}", flush=True)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    print(f"training loss, mean of these steps: {result.training_loss:.4f}")
    if heldout is not None:
        print(f"held-out loss after: {_last_loss(trainer):.4f}")
    history += trainer.state.log_history
    fastprefix.save(model, options.output)
    after = sample.complete_example(model.eval(), tokenizer, example, with_prefix=True)
    print("\n" + sample.table(tokenizer, example, "training" if heldout is None else "held-out", before, after))
    print("\n" + plot.write(Path(options.output), history))
    print(f"adapter saved in {options.output}; to use it:\n")
    print(f"  {sample.command(options, examples)}")
    return 0


def _checkpoint(options: argparse.Namespace) -> str | None:
    """The checkpoint to resume from; without ``--resume``, an earlier run's checkpoints must not be overwritten."""
    output = Path(options.output)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if not options.resume:
        if last is not None:
            raise ValueError(f"--output: {last} is there: pass --resume to go on from it, or another folder")
        return None
    if last is None:
        raise ValueError(f"--resume: no checkpoint in {output}")
    if options.save_start is not None and not Path(options.save_start, CONFIG).is_file():
        expected = "expected the adapter that the interrupted run wrote there, or no --save-start with --resume"
        raise ValueError(f"--save-start: no {CONFIG} in {options.save_start}, {expected}")
    return last


def _attach(
    model: Any, config: fastprefix.PrefixConfig | fastprefix.PromptConfig, options: argparse.Namespace
) -> torch.nn.Module:
    try:
        prefix: torch.nn.Module = fastprefix.attach(model, config)
    except ValueError as error:
        if str(error).startswith("init: ") and options.init != "random":
            raise ValueError(f"--init random is what this model needs: {error}") from error
        raise
    return prefix


def _trainer(
    options: argparse.Namespace, model: Any, tokenizer: Any, rows: Sequence[Row], heldout: Sequence[Row] | None
) -> PrefixTrainer:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = PrefixTrainer(
        model=model,
        args=_training_arguments(options),
        data_collator=collator(pad),
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    return trainer


def _last_loss(trainer: PrefixTrainer) -> float:
    """The held-out loss after training; the evaluation of the last epoch is used if there was one."""
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if measured and measured[-1]["step"] == trainer.state.global_step:
        return float(measured[-1]["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])


def _training_arguments(options: argparse.Namespace) -> TrainingArguments:
    when = "steps" if options.save_steps else "epoch"
    return TrainingArguments(
        output_dir=options.output,
        learning_rate=options.lr,
        num_train_epochs=options.epochs,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        seed=options.seed,
        logging_steps=0.05,
        save_strategy=when,
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        eval_strategy=when if options.eval_data else "no",
        eval_steps=options.save_steps,
        report_to="none",
        disable_tqdm=True,  # fastprefix.train.progress prints the progress instead
        bf16=False,  # with --bf16 the weights are loaded in bf16: autocast would convert them in every step
        dataloader_pin_memory=torch.cuda.is_available(),
    )
