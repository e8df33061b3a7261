"""``fastprefix memory``: count the bytes that a training step saves for backward."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import TYPE_CHECKING

import torch

from fastprefix.cli.options import whole_number
from fastprefix.machine.text_table import text_table
from fastprefix.measure.report_tables import mebibytes

if TYPE_CHECKING:
    from torch import nn

PREFIXES = (16, 128, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix memory``."""
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="causal model (default: a tiny random Llama)")
    parser.add_argument("--batch", type=whole_number(), default=8, metavar="B", help="(%(default)s)")
    parser.add_argument("--seq", type=whole_number(), default=128, metavar="S", help="tokens a sample (%(default)s)")
    parser.add_argument("--prefix", type=whole_number(), action="append", metavar="P", help=f"repeatable ({PREFIXES})")


def run(args: argparse.Namespace) -> int:
    """Print the bytes that a step saves for backward, ours and PEFT's, by prefix length, without parameters.

    Returns:
        0.

    Raises:
        ValueError, OSError: the model does not exist, or a prefix cannot be attached to it.
    """
    from fastprefix.measure.training.compare_steps import FROZEN, OURS, PEFT, build_steps

    names = [OURS, PEFT]
    if importlib.util.find_spec("peft") is None:
        names.remove(PEFT)
        print("peft is not installed: its column is left out", file=sys.stderr)
    model = _model(args.model)
    vocab = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, vocab, (args.batch, args.seq), generator=torch.Generator().manual_seed(0))
    frozen = build_steps(model, ids, 1, [FROZEN])[FROZEN].saved_bytes()
    rows: list[tuple[str, ...]] = [("0", *(mebibytes(frozen) for _ in names), *("-" for _ in names))]
    for P in sorted(args.prefix or PREFIXES):
        saved = [step.saved_bytes() for step in build_steps(model, ids, P, names).values()]
        rows.append((str(P), *map(mebibytes, saved), *(mebibytes(x - frozen) for x in saved)))
    print(f"saved for backward by one forward of {args.batch} x {args.seq} tokens, parameters not counted;")
    print("P = 0 is the frozen model, its gradient going down as far as a prefix makes it go")
    print(text_table(("P", *names, *(f"{name}: beyond P = 0" for name in names)), rows))
    return 0


def _model(name: str | None) -> nn.Module:
    if name is None:
        from fastprefix.measure.training.random_models import random_llama

        return random_llama()
    from fastprefix.models import find_model, load_model

    model: nn.Module = load_model(find_model(name))
    return model.train()
