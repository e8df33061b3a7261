"""The backend ``cuda`` with a library that computes on the processor what a call's fields say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastprefix.backends import cuda
from tests.cuda.libraries import compile_host, once

NAMESPACE = "fastprefix_plain"


@pytest.fixture(scope="session")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).with_name("plain_decode.cpp")
    return once(tmp_path_factory, "plain.so", lambda out: compile_host(out, NAMESPACE, [source]))


@pytest.fixture
def plain(plain_library: Path) -> Iterator[Path]:
    """The library is in use."""
    with cuda.emulated(str(plain_library), NAMESPACE):
        yield plain_library
