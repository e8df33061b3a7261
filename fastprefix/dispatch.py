"""Which backend takes a call, and why. ``auto`` takes the first of the device's order that has no reason against it."""

from __future__ import annotations

from types import ModuleType

from . import reference
from .backends import aten, triton
from .errors import UnsupportedError, fail
from .types import BACKENDS, AttentionArgs, BackendName

# Only what has run on such a device stands in its order. `aten` has not run on a GPU: ask for it by name there.
AUTO_ORDER: dict[str, tuple[BackendName, ...]] = {"cpu": ("aten", "reference")}
DEFAULT_ORDER: tuple[BackendName, ...] = ("reference",)


def module(name: BackendName) -> ModuleType:
    """The three functions of a backend."""
    match name:
        case "reference":
            return reference
        case "aten":
            return aten
        case "triton":
            return triton


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a backend or ``auto``."""
    if name != "auto" and name not in BACKENDS:
        raise fail("backend", repr(name), "'auto' or " + " or ".join(repr(b) for b in BACKENDS))


def auto_order(device_type: str) -> tuple[BackendName, ...]:
    """What ``auto`` tries on a device, first to last."""
    return AUTO_ORDER.get(device_type, DEFAULT_ORDER)


def choose(args: AttentionArgs, name: str) -> ModuleType:
    """The backend for a call. One asked for by name never falls back: it raises :class:`UnsupportedError`."""
    check_name(name)
    if name != "auto":
        chosen = module(name)  # type: ignore[arg-type]
        reasons = chosen.unsupported(args)
        if reasons:
            raise UnsupportedError(f"backend {name!r} cannot take this call:\n  " + "\n  ".join(reasons))
        return chosen
    for candidate in auto_order(args.q.device.type):
        if not module(candidate).unsupported(args):
            return module(candidate)
    raise AssertionError("the reference takes every call")


def explain(args: AttentionArgs) -> str:
    """One line a backend: chosen by ``auto``, available, or its reasons against the call."""
    order = auto_order(args.q.device.type)
    chosen = choose(args, "auto")
    lines = []
    for name in BACKENDS:
        reasons = module(name).unsupported(args)
        if reasons:
            verdict = "cannot: " + "; ".join(reasons)
        elif module(name) is chosen:
            verdict = "chosen by auto"
        elif name not in order:
            verdict = f"can, by name only: not in auto's order on {args.q.device.type}"
        else:
            verdict = "can, but auto prefers " + next(n for n in order if module(n) is chosen)
        lines.append(f"{name:<10} {verdict}")
    return "\n".join(lines)
