"""One server of a small random model with adapters, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.engine.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server."""
    made = Server(tmp_path_factory.mktemp("served"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
