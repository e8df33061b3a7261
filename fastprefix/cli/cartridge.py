"""``fastprefix cartridge``: a trained prefix that stands for a document."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastprefix.cli.options import check_file, check_output, positive_number, probability, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix cartridge``."""
    files = parser.add_argument_group("files")
    files.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="causal language model, or smollm2")
    files.add_argument(
        "--text", required=True, metavar="FILE", action="append", help="the document; several get a cartridge each"
    )
    files.add_argument(
        "--conversations",
        metavar="FILE",
        help="JSON lines as those of train --data, in place of what the model asks itself; the first are held out",
    )
    files.add_argument("--output", required=True, metavar="DIR", help="of the cartridge, checkpoints and the report")
    size = parser.add_argument_group("cartridge")
    size.add_argument("--tokens", type=whole_number(), default=512, metavar="P", help="default %(default)s")
    size.add_argument(
        "--start",
        choices=("attention-matching", "first-tokens"),
        default="attention-matching",
        help="where training starts; default %(default)s",
    )
    study = parser.add_argument_group("self-study")
    study.add_argument(
        "--num-conversations", type=whole_number(2), default=256, metavar="N", help="a document; default %(default)s"
    )
    study.add_argument("--question-tokens", type=whole_number(), default=32, metavar="N", help="default %(default)s")
    study.add_argument("--answer-tokens", type=whole_number(), default=64, metavar="N", help="default %(default)s")
    study.add_argument(
        "--heldout",
        type=probability,
        default=0.1,
        metavar="SHARE",
        help="measured, not trained on; default %(default)s",
    )
    study.add_argument(
        "--top-k", type=whole_number(), default=32, metavar="K", help="stored of each prediction; default %(default)s"
    )
    steps = parser.add_argument_group("training")
    steps.add_argument("--lr", type=positive_number, default=5e-3, metavar="LR", help="of AdamW, default %(default)s")
    steps.add_argument("--epochs", type=positive_number, default=4.0, metavar="N", help="default %(default)s")
    steps.add_argument("--max-steps", type=whole_number(), metavar="N", help="in place of --epochs")
    steps.add_argument(
        "--batch-size", type=whole_number(), default=8, metavar="B", help="conversations a step, default %(default)s"
    )
    steps.add_argument("--eval-steps", type=whole_number(), default=20, metavar="N", help="default %(default)s")
    steps.add_argument(
        "--patience", type=whole_number(), default=5, metavar="N", help="measurements without a better one, then stop"
    )
    steps.add_argument("--minutes", type=positive_number, metavar="M", help="stop training M minutes after the start")
    steps.add_argument(
        "--distractors",
        type=probability,
        default=0.5,
        metavar="P",
        help="with several documents, how often a row reads another one's cartridge too; default %(default)s",
    )
    steps.add_argument("--resume", action="store_true", help="go on with what is in --output")
    steps.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help="default %(default)s")


def run(options: argparse.Namespace) -> int:
    """Make a cartridge of each document, save it, and say how well it stands for the document.

    Returns:
        0, the exit status.

    Raises:
        OSError, ValueError: a file or an option is wrong.
    """
    from fastprefix.models import find_model, load_model, load_tokenizer

    check_output("--output", options.output)
    texts = []
    for file in options.text:
        check_file("--text", file)
        texts.append(Path(file).read_text(encoding="utf-8"))
    if options.conversations is not None:
        check_file("--conversations", options.conversations)
    found = find_model(options.model)

    from fastprefix.cartridges import CartridgeConfig, train_cartridge

    names = CartridgeConfig.__dataclass_fields__.keys() & vars(options).keys()
    config = CartridgeConfig(**{name: getattr(options, name) for name in names})
    report = train_cartridge(
        load_model(found),
        load_tokenizer(found),
        texts,
        options.output,
        config,
        conversations=options.conversations,
        minutes=options.minutes,
        resume=options.resume,
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{report.text()}\n")
    folder = options.output if len(texts) == 1 else f"{options.output}/document_0"
    print(f"the page with the curve: {options.output}/report.html; to use the cartridge:\n")
    print(f"  fastprefix generate {folder} --model {options.model} --chat --prompt TEXT")
    return 0
