"""Which backend takes a call, and why. ``auto`` takes the fastest that was proved right on the device for its kind."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .errors import UnsupportedError, fail
from .machine import device
from .types import BACKENDS, AttentionArgs, BackendName
from .verification import lookup, ranking, store
from .verification.routes import Candidate, module, no_backward
from .verification.store import Policy

__all__ = ["UnsupportedError", "check_name", "choose", "explain", "has_every_gradient", "module", "name_of"]


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a backend or ``auto``."""
    if name != "auto" and name not in BACKENDS:
        raise fail("backend", repr(name), "'auto' or " + " or ".join(repr(b) for b in BACKENDS))


def choose(args: AttentionArgs, name: str, mode: str = "forward") -> Candidate:
    """The backend for a call, and which route of it.

    One asked for by name never falls back: it raises :class:`UnsupportedError`. It runs whether it was proved or not.

    Args:
        mode: ``forward``, ``backward``, or ``lowest`` for a backward of the prefix alone.
    """
    if name != "auto":
        check_name(name)
        chosen = module(name)  # type: ignore[arg-type]
        if name == "cuda":
            chosen.prepare(args.q.device)
        reasons = _reasons(chosen, args, mode != "forward")
        if reasons:
            raise UnsupportedError(f"backend {name!r} cannot take this call:\n  " + "\n  ".join(reasons))
        return Candidate(chosen, None)
    for candidate in ranking.order(args, mode):
        if not candidate.module.unsupported(args, candidate.route):
            return candidate
    raise AssertionError("the reference takes every call")


def _reasons(backend: ModuleType, args: AttentionArgs, trained: bool) -> list[str]:
    """Why a backend cannot take a call; of one that is trained, why it has no gradients, if that is another reason."""
    reasons: list[str] = backend.unsupported(args)
    if trained:
        reasons = reasons + [x for x in no_backward(backend, args) if x.removeprefix("gradients: ") not in reasons]
    return reasons


def has_every_gradient(name: BackendName) -> bool:
    """Whether a backend has gradients of every call that it takes."""
    return not hasattr(module(name), "backward_unsupported")


def name_of(backend: ModuleType) -> str:
    """The name of a backend's module."""
    return next(name for name in BACKENDS if module(name) is backend)


def explain(args: AttentionArgs) -> str:
    """One line a backend: chosen by ``auto``, available, or its reasons against the call; and what was proved of it.

    Nothing is verified here: where something is missing, the line says so.
    """
    off = store.policy() is Policy.OFF
    order = ranking.known(args, "forward")
    chosen = next(x for x in order if not x.module.unsupported(args, x.route))
    known = lookup.describe(args, "forward", chosen)
    lines = []
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in _trainable(args))
    for name in BACKENDS:
        reasons = _reasons(module(name), args, trained and module(name) is not chosen.module)
        if reasons:
            verdict = "cannot: " + "; ".join(reasons)
        elif module(name) is chosen.module:
            verdict = "chosen by auto"
        elif any(module(name) is x.module for x in order):
            verdict = f"can, but auto prefers {name_of(chosen.module)}"
        else:
            verdict = "can, by name only"
        if not reasons and name != "reference":
            verdict += ": " + (_unknown(args) if off or name not in known else known[name])
        lines.append(f"{name:<10} {verdict}")
    return "\n".join(lines)


def _trainable(args: AttentionArgs) -> list[Tensor]:
    """The tensors that can get gradients."""
    found = (args.q, args.k, args.v, args.prefix_k, args.prefix_v, args.sinks, args.bias, args.prefix_bias)
    return [x for x in found if x is not None]


def _unknown(args: AttentionArgs) -> str:
    """Why nothing is known of a backend."""
    place = args.q.device
    if store.policy() is Policy.OFF:
        return f"not proved: {store.VARIABLE}=off"
    told = f"not proved on {store.table(place).identity['device']}: `fastprefix verify` does it"
    return f"{told}, or the first call" if device.kind(place) in device.GPUS else told
