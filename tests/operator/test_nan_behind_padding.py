"""The table of arguments says of each backend what nan behind a padding mask does."""

from __future__ import annotations

import pytest

from fastprefix.dispatch import UnsupportedError
from fastprefix.types import BACKENDS
from tests.project.support_tables import OPERATOR
from tests.support.nan_behind_padding import HIDDEN, REACHES, measured


def cell(backend: str, name: str) -> str:
    """What ``docs/operator.md`` says."""
    what = {"k": "keys", "v": "values"}[name]
    page = OPERATOR.read_text()
    (line,) = [x for x in page.splitlines() if x.startswith(f"| nan in {what} that key_padding_mask hides")]
    return line.split(" | ")[1 + BACKENDS.index(backend)].removesuffix(" |")


@pytest.mark.parametrize("name", ["k", "v"])
def test_as_the_table_says(backend: str, name: str) -> None:
    try:
        assert measured(backend, name) == cell(backend, name)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert cell(backend, name) in (HIDDEN, REACHES)
    assert cell("reference", name) == HIDDEN
