"""The README's support tables, from what is tested and what backends say: ``python -m tests.support_table``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The kernels are asked as on a GPU: interpreted, they refuse nothing for being on a CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

from fastprefix import dispatch, prefix_attention
from fastprefix.types import BACKENDS, AttentionArgs
from tests.model_zoo.architectures import REFUSED, ROWS
from tests.model_zoo.encoder_decoders import ALL as ENCODER_DECODERS
from tests.model_zoo.encoder_decoders import LOADED
from tests.model_zoo.row import Row
from tests.support.nan_behind_padding import measured
from tests.support.operator_calls import make_call

README = Path(__file__).parents[1] / "README.md"

# One call for each argument of the operator, as each backend is asked about it.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal, GQA, any strides, P = 0": lambda: {},
    "key_padding_mask": lambda: {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)},
    "segment_ids": lambda: {"segment_ids": torch.zeros(2, 5, dtype=torch.long)},
    "q_start (int, tensor)": lambda: {"q_start": torch.tensor([0, 1])},
    "window": lambda: {"window": 3},
    "softcap": lambda: {"softcap": 2.0},
    "sinks": lambda: {"sinks": torch.zeros(6)},
    "bias": lambda: {"bias": torch.zeros(6, 5, 5)},
    "bias with a gradient": lambda: {"bias": torch.zeros(6, 5, 5), "bias_grad": True},
    "prefix_ids, prefix_lens": lambda: {"prefix_ids": torch.zeros(2, dtype=torch.long)},
    "dropout_p": lambda: {"dropout_p": 0.1},
}


HEAD = (
    "model",
    "class",
    "what is special",
    "forward",
    "gradients",
    "padding",
    "generate",
    "checkpointing",
    "compile",
    "= PEFT",
)
MODES = {(True, False): "yes", (False,): "non-reentrant", (): "no: it has none"}


def models() -> str:
    """One row an architecture; cells are tests of ``test_conformance.py`` and ``test_encoder_decoder.py``."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for row in ROWS.values():
        padding = " ".join(side for side in row.paddings if side != "none") or "-"
        generate = "yes" if row.generates else "-"
        peft = "yes" if row.peft is None else f"no: PEFT's {row.peft}"
        lines.append(_line(row, padding, generate, MODES[row.modes], peft))
    for name, row in ENCODER_DECODERS.items():
        peft = "loads" if name in LOADED else "-"
        lines.append(_line(row, "left right", "yes, with beams", "yes", peft))
    refused = ", ".join(f"`{name}`" for name in REFUSED)
    return "\n".join(
        [*lines, "", f"Refused when attached, with the reason, instead of ignoring the prefix: {refused}."]
    )


def _line(row: Row, *cells: str) -> str:
    padding, generate, checkpointing, peft = cells
    return (
        f"| {row.title} | `{row.cls}` | {row.notes or '-'} | yes | yes | {padding} | {generate} | {checkpointing} "
        f"| yes | {peft} |"
    )


def arguments() -> str:
    """One row an argument: what each backend's ``unsupported`` says to it on the CPU."""
    lines = ["| argument | " + " | ".join(f"`{b}`" for b in BACKENDS) + " |", "|---|" + "---|" * len(BACKENDS)]
    for name, make in ARGUMENTS.items():
        options = make()
        bank = 2 if "prefix_ids" in options else None
        args = AttentionArgs(**make_call(N=bank).leaves, scale=1.0, **options)
        cells = ["; ".join(dispatch.module(b).unsupported(args)) or "yes" for b in BACKENDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    gated = {**make_call().leaves, "gate": torch.zeros(6)}
    for b in BACKENDS:
        prefix_attention(**gated, backend=b)  # raises where the two calls that a gate is made of are refused
    lines.append("| gate |" + " yes |" * len(BACKENDS))
    for name, what in (("k", "keys"), ("v", "values")):
        cells = [measured(backend, name) for backend in BACKENDS]
        lines.append(f"| nan in {what} behind key_padding_mask | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill(text: str) -> str:
    """The README with its generated parts made anew."""
    for name, table in (("models", models()), ("arguments", arguments())):
        begin, end = f"<!-- {name}: python -m tests.support_table -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text()))
    sys.exit(0)
