"""One server of a small random model with adapters, for all tests of this folder; they need vLLM (make test-serve)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-serve runs these in a venv of its own")

from tests.serving.engine.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server."""
    made = Server(tmp_path_factory.mktemp("served"))
    made.start()
    yield made
    made.stop()
