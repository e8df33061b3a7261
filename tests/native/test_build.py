"""The compiled extension: how it is built, found and refused."""

from __future__ import annotations

from fastprefix import _extension


def test_it_loads() -> None:
    module, absence = _extension.load()
    assert module is not None, absence
    assert module.built_for() and module.isa()
