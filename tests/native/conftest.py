"""The compiled extension, for tests that need it."""

from __future__ import annotations

from types import ModuleType

import pytest

from fastprefix import _extension


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """Skips, with the reason that a user reads, where there is none."""
    module, absence = _extension.load()
    if module is None:
        pytest.skip(absence)
    return module
