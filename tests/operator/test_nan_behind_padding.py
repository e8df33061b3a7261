"""The table of arguments says of each backend what nan behind a padding mask does."""

from __future__ import annotations

import pytest

from fastprefix.dispatch import UnsupportedError
from fastprefix.types import BACKENDS
from tests.support.nan_behind_padding import HIDDEN, REACHES, measured
from tests.support_table import README


def cell(backend: str, name: str) -> str:
    """What the README says."""
    what = {"k": "keys", "v": "values"}[name]
    (line,) = [x for x in README.read_text().splitlines() if x.startswith(f"| nan in {what} behind")]
    return line.split(" | ")[1 + BACKENDS.index(backend)].removesuffix(" |")


@pytest.mark.parametrize("name", ["k", "v"])
def test_as_the_table_says(backend: str, name: str) -> None:
    try:
        assert measured(backend, name) == cell(backend, name)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert cell(backend, name) in (HIDDEN, REACHES)
    assert cell("reference", name) == HIDDEN
