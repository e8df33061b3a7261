"""``train_cartridge``: from documents to trained, saved and measured cartridges."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import PrinterCallback

from fastprefix.cartridges import preparation
from fastprefix.cartridges.batches import Example, collate
from fastprefix.cartridges.config import CartridgeConfig
from fastprefix.cartridges.measure import Name, measure, of_text
from fastprefix.cartridges.preparation import Document
from fastprefix.cartridges.report import COMPOSED, FIRST, NONE, START, TRAINED, WHOLE, Report
from fastprefix.cartridges.report_page import write_page
from fastprefix.cartridges.trainer import CartridgeTrainer, LastStep, found_checkpoint, training_arguments
from fastprefix.errors import fail
from fastprefix.hf.adapters.lookup import find_installation
from fastprefix.hf.api import attach, detach, save, set_prefix
from fastprefix.prefixes.config import PrefixConfig
from fastprefix.train.progress import Progress

Say = Callable[[str], None]


def train_cartridge(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    output: str | os.PathLike[str],
    config: CartridgeConfig | None = None,
    *,
    conversations: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    resume: bool = False,
    say: Say = print,
) -> Report:
    """Train a prefix that stands for a document: a cartridge (Eyuboglu et al. 2025, arXiv:2506.06266).

    The model asks itself about the document and answers with all of it in front (self-study). What it predicts there is
    stored, and a prefix of keys and values, which starts at :func:`fastprefix.attention_matching`, is trained to make
    the model predict the same without the document. Afterwards the cartridges are attached to the model.

    Args:
        model: a causal language model of transformers without prefixes.
        tokenizer: of the model.
        texts: a document, or several, each of which gets a cartridge.
        output: a folder. One cartridge is saved in it, several in its folders ``document_0``, ``document_1`` and so on;
            next to them are the conversations, the stored predictions, checkpoints and the report.
        config: sizes and training, default ``CartridgeConfig()``.
        conversations: a file of JSON lines to train on in place of self-study, as ``fastprefix train`` takes; for a
            single document.
        minutes: stop training after this time, counted from the call; the best measured cartridge is what is saved.
        resume: go on with what an interrupted call left in ``output``. The result has the same bits as without the
            interruption.
        say: called with each line of progress.

    Returns:
        The :class:`Report`, which is also written to ``output`` as ``report.html`` and ``report.json``.

    Raises:
        ValueError: an argument does not fit; it is named.
        OSError: a file cannot be read or written.
    """
    config = CartridgeConfig() if config is None else config
    deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
    began, cpu = time.perf_counter(), time.process_time()
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise fail("texts", "none", "at least one document")
    if conversations is not None and len(texts) > 1:
        raise fail("conversations", f"a file for {len(texts)} documents", "a file for one document, or self-study")
    if find_installation(model) is not None:
        raise fail("model", "one with prefixes attached", "one without: detach them first")
    folder = Path(output)
    checkpoint = found_checkpoint(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        preparation.prepare(model, tokenizer, text, i, folder, config, conversations, resume, say)
        for i, text in enumerate(texts)
    ]
    names = ["default"] if len(documents) == 1 else [f"document_{i}" for i in range(len(documents))]
    heldout = [example for document in documents for example in document.heldout]
    packed = len(documents) == 1 and preparation.packs(model)
    report = _baseline(folder, model, documents, heldout, config, names, resume, say)
    _attach(model, documents, names, config)
    report.prepared_seconds, report.prepared_cpu = time.perf_counter() - began, time.process_time() - cpu
    _train(model, documents, names, packed, folder, config, checkpoint, deadline, report, say)
    many = names if len(names) > 1 else None
    report.losses[TRAINED] = measure(model, heldout, config.batch_size, packed, many)
    start = report.losses.get(START) or report.losses[FIRST]
    if report.losses[TRAINED].divergence > start.divergence:
        say("no measured step was closer to the whole text than the start, which is kept")
        detach(model)
        _attach(model, documents, names, config)
        report.losses[TRAINED] = start
    if many:
        # In front of each document's own, the cartridges of all others.
        composed: list[Name] = [(*(x for x in names if x != name), name) for name in names]
        report.losses[COMPOSED] = measure(model, heldout, config.batch_size, packed, composed)
    for name in names:
        save(model, folder if len(names) == 1 else folder / name, name)
    answers = preparation.answers(model, tokenizer, documents[0].questions, names[0])
    report.samples = [{**given, TRAINED: x} for given, x in zip(report.samples, answers, strict=True)]
    report.write(folder / "report.json")
    write_page(folder / "report.html", report)
    return report


def _attach(model: Any, documents: Sequence[Document], names: Sequence[str], config: CartridgeConfig) -> None:
    """Attach each document's cartridge at its start."""
    for document, name in zip(documents, names, strict=True):
        attach(model, PrefixConfig(init=document.start, num_frozen_tokens=config.num_frozen_tokens), name)


def _baseline(
    folder: Path,
    model: Any,
    documents: Sequence[Document],
    heldout: Sequence[Example],
    config: CartridgeConfig,
    names: Sequence[str],
    resume: bool,
    say: Say,
) -> Report:
    """The report's first half: what does not depend on training, measured once and kept in a file."""
    path = folder / "baseline.json"
    if resume and path.is_file():
        return Report.read(path)
    losses = {NONE: _bare(model, documents, heldout, config)}
    starts = {FIRST: [d.first_tokens for d in documents]}
    if config.start == "attention-matching":
        starts[START] = [d.start for d in documents]
    for title, inits in starts.items():
        for name, start in zip(names, inits, strict=True):
            attach(model, PrefixConfig(init=start), name)
        many = names if len(names) > 1 else None
        packed = len(names) == 1 and preparation.packs(model)
        losses[title] = measure(model, heldout, config.batch_size, packed, many)
        detach(model)
    losses[WHOLE] = of_text(heldout)
    for title, measured in losses.items():
        say(f"held-out loss, {title}: {measured.loss:.4f}")
    report = Report(
        model=preparation.name_of(model),
        tokens=config.tokens,
        text_tokens=[len(d.ids) for d in documents],
        conversations=[len(d.trained) for d in documents],
        heldout=len(heldout),
        losses=losses,
        bytes=[(d.bytes_of_text, d.bytes_of_cartridge) for d in documents],
        start_seconds=sum(d.start_seconds for d in documents),
        start_cpu=sum(d.start_cpu for d in documents),
        samples=documents[0].samples,
    )
    report.write(path)
    return report


def _bare(model: Any, documents: Sequence[Document], heldout: Sequence[Example], config: CartridgeConfig) -> Any:
    """The model without any text. A prefix is attached and not read, so that packed rows are told apart."""
    attach(model, PrefixConfig(1), "default")
    set_prefix(model, None)
    try:
        return measure(model, heldout, config.batch_size, preparation.packs(model))
    finally:
        detach(model)


def _train(
    model: Any,
    documents: Sequence[Document],
    names: Sequence[str],
    packed: bool,
    folder: Path,
    config: CartridgeConfig,
    checkpoint: str | None,
    deadline: float | None,
    report: Report,
    say: Say,
) -> None:
    trainer = CartridgeTrainer(
        model=model,
        args=training_arguments(folder, config),
        data_collator=lambda examples: collate(examples, packed),
        train_dataset=[example for document in documents for example in document.trained],
        eval_dataset=[example for document in documents for example in document.heldout],
        names=list(names) if len(names) > 1 else None,
        distractors=config.distractors,
        packed=packed,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    trainer.add_callback(LastStep(deadline))
    if config.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    began, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(config.seed)
    trainer.train(resume_from_checkpoint=checkpoint)
    report.seconds, report.cpu = time.perf_counter() - began, time.process_time() - cpu
    report.steps = trainer.state.global_step
    report.curve = [
        {"step": entry["step"], **{key: entry[key] for key in ("loss", "eval_loss", "eval_divergence") if key in entry}}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
