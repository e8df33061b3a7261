"""The errors that the package raises: an argument that does not fit, a backend that cannot take a call."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """A backend asked for by name cannot take the call; the message lists its reasons."""


def fail(name: str, got: object, expected: str) -> ValueError:
    """The one form of every complaint: the argument, what came, what was expected."""
    return ValueError(f"{name}: got {got}, expected {expected}")
