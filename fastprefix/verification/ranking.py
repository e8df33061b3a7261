"""The order in which ``auto`` tries backends for a call; what is missing in the table is verified first."""

from __future__ import annotations

import threading

from ..backends import native
from ..types import AttentionArgs
from . import first_use, lookup, store
from .cells import signature
from .routes import Candidate
from .store import Policy

MOST_KEPT = 4096
ONE: tuple[Candidate, ...] = (lookup.REFERENCE,)
_lock = threading.RLock()


def order(args: AttentionArgs, mode: str) -> tuple[Candidate, ...]:
    """What ``auto`` tries for a call, first to last; the reference ends it.

    Args:
        mode: ``forward``, or ``backward`` and ``lowest`` (the prefix's gradients alone) for a backward.

    Raises:
        ValueError: ``$FASTPREFIX_VERIFY`` names a file that is not there.
    """
    key = signature(args, mode)
    found: tuple[Candidate, ...] | None = store.decisions.get(key)
    return _decide(args, mode, key) if found is None else found


def known(args: AttentionArgs, mode: str) -> tuple[Candidate, ...]:
    """As :func:`order`, by what is known now: nothing is verified and nothing decided."""
    found: tuple[Candidate, ...] | None = store.decisions.get(signature(args, mode))
    if found is not None:
        return found
    return lookup.unproved(args, mode) if store.policy() is Policy.OFF else lookup.order(args, mode)


def _decide(args: AttentionArgs, mode: str, key: tuple[object, ...]) -> tuple[Candidate, ...]:
    with _lock:
        if store.policy() is Policy.OFF:
            last, found = True, lookup.unproved(args, mode)
        elif args.dropout_p > 0.0 or args.bias_grad:  # no other backend takes them
            last, found = True, ONE
        else:
            last = first_use.verify_call(args, mode)
            found = lookup.order(args, mode)
        if last and not first_use.is_held():
            if len(store.decisions) >= MOST_KEPT:
                store.forget_decisions()
            store.decisions[key] = found
            taken = next(chosen for chosen in found if not chosen.module.unsupported(args, chosen.route))
            if mode == "forward" and taken.module is native:
                native.remember(args)
        return found
