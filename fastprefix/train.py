"""``fastprefix train``: a prefix for a causal language model from prompt/completion pairs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import fastprefix
from fastprefix import init
from fastprefix.data import collator, load_pairs
from fastprefix.hf.trainer import PrefixTrainer

SMOLLM2 = "smollm2"


def load_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model in eval mode: a folder, a name that transformers knows, or ``smollm2``."""
    return AutoModelForCausalLM.from_pretrained(_source(name), dtype=dtype).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model."""
    return AutoTokenizer.from_pretrained(_source(name))


def _source(name: str) -> str:
    if name == SMOLLM2 and not Path(name).exists():
        from fastprefix.assets.smollm2 import smollm2_dir

        return str(smollm2_dir())
    if not Path(name).is_dir() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise ValueError(f"--model: no folder {name}")
    return name


def train(options: argparse.Namespace) -> int:
    """Train, evaluate where there is held-out data, save the adapter; options as ``fastprefix train --help``.

    Returns:
        0, the exit status.

    Raises:
        OSError, ValueError: a file or an option is wrong.
    """
    checkpoint = _checkpoint(options)
    tokenizer = load_tokenizer(options.model)
    rows = load_pairs(options.data, tokenizer, options.max_length)
    heldout = load_pairs(options.eval_data, tokenizer, options.max_length) if options.eval_data else None
    model = load_model(options.model, torch.bfloat16 if options.bf16 else torch.float32)
    torch.manual_seed(options.seed)
    prefix = fastprefix.attach(model, _prefix_config(options, tokenizer))
    if options.gradient_checkpointing:
        checkpoint_layers(model)
    trained = sum(p.numel() for p in prefix.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"{len(rows)} pairs; {trained:,} parameters trained, {frozen:,} frozen")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = PrefixTrainer(
        model=model,
        args=_training_arguments(options),
        data_collator=collator(pad),
        train_dataset=rows,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    if heldout is not None and checkpoint is None:
        print(f"held-out loss before: {trainer.evaluate()['eval_loss']:.4f}")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    print(f"training loss, mean of these steps: {result.training_loss:.4f}")
    if heldout is not None:
        print(f"held-out loss after: {trainer.evaluate()['eval_loss']:.4f}")
    fastprefix.save(model, options.output)
    print(f"adapter saved in {options.output}")
    return 0


def _checkpoint(options: argparse.Namespace) -> str | None:
    """The checkpoint to go on from; a forgotten ``--resume`` must not overwrite an earlier run's."""
    output = Path(options.output)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if not options.resume:
        if last is not None:
            raise ValueError(f"--output: {last} is there: pass --resume to go on from it, or another folder")
        return None
    if last is None:
        raise ValueError(f"--resume: no checkpoint in {output}")
    return last


def _prefix_config(options: argparse.Namespace, tokenizer: Any) -> fastprefix.PrefixConfig:
    start = init.normal() if options.init_text is None else init.text(options.init_text, tokenizer)
    return fastprefix.PrefixConfig(options.num_virtual_tokens, prefix_projection=options.prefix_projection, init=start)


def checkpoint_layers(model: Any) -> None:
    """Recompute layers in the backward pass, by whichever name this release of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
        bf16=False,  # the frozen weights were loaded so: autocast would convert them again in every step
        dataloader_pin_memory=torch.cuda.is_available(),
    )
