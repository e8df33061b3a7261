"""Backends by name, and the routes of each: a route is one way of a backend, ``aten:folded`` or ``triton:split``."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from .. import reference
from ..backends import aten, cuda, native, triton
from ..types import BACKENDS, AttentionArgs, BackendName
from .cells import Direction


class Candidate(NamedTuple):
    """A backend's module and one of its routes; None is the one that the backend guesses."""

    module: ModuleType
    route: str | None


def module(name: BackendName) -> ModuleType:
    """The three functions of a backend."""
    match name:
        case "reference":
            return reference
        case "native":
            return native
        case "aten":
            return aten
        case "triton":
            return triton
        case "cuda":
            return cuda


def backend_of(route: str) -> BackendName:
    """The backend of ``aten:folded``.

    Raises:
        ValueError: there is no such backend.
    """
    found = route.partition(":")[0]
    for name in BACKENDS:
        if name == found:
            return name
    raise ValueError(f"route: got {route!r}, expected one of {', '.join(BACKENDS)}")


def candidate(route: str) -> Candidate:
    """The module of ``aten:folded``, and ``folded``."""
    return Candidate(module(backend_of(route)), route.partition(":")[2] or None)


def routes(device_type: str, direction: Direction) -> list[str]:
    """Every route that could compute a call on such a device, but for the reference, which judges them."""
    found = []
    for name in BACKENDS:
        if name == "reference":
            continue
        own, decoding = module(name).routes(device_type), decode_routes(module(name))
        found += [f"{name}:{route}" for route in own if direction == "decode" or route not in decoding]
    return found


def decode_routes(backend: ModuleType) -> tuple[str, ...]:
    """A backend's routes that decode and do nothing else: they split the keys of few rows over programs."""
    return getattr(backend, "DECODE_ROUTES", ())


def no_backward(backend: ModuleType, args: AttentionArgs) -> list[str]:
    """Why a backend computes no gradients of a call that it takes; empty where it does."""
    reasons: list[str] = backend.backward_unsupported(args) if hasattr(backend, "backward_unsupported") else []
    return reasons
