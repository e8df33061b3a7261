"""What a check of a class ends in, and the comparison that decides it."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RIGHT, REFUSED, RAISED, DIFFERS = "right", "refused", "raised later", "differs"
ORACLE, PEFT = "oracle failed", "PEFT refuses"
UNTRUE = "refused untruly"  # with a reason that the bare model contradicts
RED = (RAISED, DIFFERS, UNTRUE)
# The worst of its cases is a check's outcome.
_WORST = (DIFFERS, RAISED, UNTRUE, RIGHT, REFUSED, PEFT, ORACLE)
RTOL = 1e-6
_INFINITE = 1e30
# What a forward returns beside its result.
_BESIDE = ("past_key_values", "hidden_states", "attentions", "router", "rope_deltas", "aux", "mems", "image_hidden")


@dataclass
class Outcome:
    """Of one check: its worst case's, with what each case said."""

    outcome: str
    message: str = ""
    cases: dict[str, str] = field(default_factory=dict)

    @property
    def red(self) -> bool:
        return self.outcome in RED

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def worst(cases: dict[str, Outcome]) -> Outcome:
    """One outcome for a check, the worst of its cases."""
    name, found = min(cases.items(), key=lambda item: _WORST.index(item[1].outcome))
    message = found.message if found.outcome == RIGHT else f"{name}: {found.message}"
    return Outcome(found.outcome, message, {k: f"{v.outcome}: {v.message}".rstrip(": ") for k, v in cases.items()})


def line(error: BaseException) -> str:
    """An error on one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/fastprefix/" in f.filename or "/transformers/" in f.filename] or frames
    # Of the path what is the same on every machine.
    place = f" [{'/'.join(Path(ours[-1].filename).parts[-3:])}:{ours[-1].lineno}]" if ours else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{place}"


def tensors(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """The floating-point results in a forward's output by their names."""
    if isinstance(output, Tensor):
        return {prefix or "output": output} if output.is_floating_point() else {}
    if isinstance(output, dict):
        items = [(k, v) for k, v in output.items() if not any(word in k for word in _BESIDE)]
    elif isinstance(output, list | tuple):
        items = [(str(i), v) for i, v in enumerate(output)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= tensors(value, f"{prefix}.{key}" if prefix else key)
    return found


def compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> Outcome:
    """Right where every result is the wanted one to a millionth of the largest number."""
    if not want:
        return Outcome(ORACLE, "no floating-point result")
    said = []
    for name, expected in want.items():
        found = got.get(name)
        if found is None or found.shape != expected.shape:
            shape = None if found is None else tuple(found.shape)
            said.append(f"{name}: got shape {shape}, want {tuple(expected.shape)}")
            continue
        # Beside the least number there is, which stands for minus infinity, any error would be small.
        counts = expected.abs() < _INFINITE
        if not torch.equal(counts, found.abs() < _INFINITE):
            said.append(f"{name}: finite elsewhere")
            continue
        found, expected = found[counts], expected[counts]
        if not expected.numel():
            continue
        error = (found.double() - expected.double()).abs().max().item()
        if not error <= RTOL * max(1.0, expected.abs().max().item()):
            values = f", got {found.item():.6f}, want {expected.item():.6f}" if want[name].dim() == 0 else ""
            said.append(f"{name}: off by {error:.3g}{values}")
    if said:
        return Outcome(DIFFERS, "; ".join(said[:6]))
    idle = [name for name, x in want.items() if name.startswith("gradient") and not x.any()]
    return Outcome(RIGHT, f"nothing depends on {', '.join(idle)}" if idle else "")
