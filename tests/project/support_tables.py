"""The tables of tested architectures and of the operator's arguments in ``docs/``, from the tests and the backends.

``python -m tests.project.support_tables`` writes them into ``docs/architectures.md`` and ``docs/operator.md``.
"""

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
from fastprefix.backends import cuda
from fastprefix.types import BACKENDS, AttentionArgs, BackendName
from tests.model_zoo.architectures import REFUSED, ROWS
from tests.model_zoo.encoder_decoders import ALL as ENCODER_DECODERS
from tests.model_zoo.encoder_decoders import LOADED
from tests.model_zoo.row import Row
from tests.support.nan_behind_padding import EMULATED, measured
from tests.support.operator_calls import GENERAL, make_call

ROOT = Path(__file__).parents[2]
ARCHITECTURES, OPERATOR = ROOT / "docs" / "architectures.md", ROOT / "docs" / "operator.md"

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
    "prefix_bias and its gradient": lambda: {"prefix_bias": torch.zeros(2, 7)},
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
    "equals PEFT",
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
        cells = ["; ".join(_reasons(b, bank, options)) or "yes" for b in BACKENDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    gated = {**make_call().leaves, "gate": torch.zeros(6)}
    for b in GENERAL:
        prefix_attention(**gated, backend=b)  # raises where the two calls that a gate is made of are refused
    lines.append("| gate |" + " yes |" * len(BACKENDS))
    for name, what in (("k", "keys"), ("v", "values")):
        cells = [EMULATED[b][name] if b in EMULATED else measured(b, name) for b in BACKENDS]
        lines.append(f"| nan in {what} that key_padding_mask hides | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reasons(backend: BackendName, bank: int | None, options: dict[str, Any]) -> list[str]:
    """A backend's reasons against a call in fp32 or, where it only decodes in half precision, in bf16."""
    dtype = torch.float32 if backend in GENERAL else torch.bfloat16
    args = AttentionArgs(**make_call(N=bank, dtype=dtype).leaves, scale=1.0, **options)
    with cuda.emulated(None):
        return dispatch.module(backend).unsupported(args)


def fill(text: str, name: str, table: str) -> str:
    """A page whose table called ``name`` is replaced by this one."""
    begin, end = f"<!-- {name}: python -m tests.project.support_tables -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """The pages with tables, as they ought to be."""
    made = {ARCHITECTURES: ("models", models()), OPERATOR: ("arguments", arguments())}
    return {path: fill(path.read_text(), name, table) for path, (name, table) in made.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    sys.exit(0)
