"""A server that is killed in the middle of its work: nothing on disk is lost, and the next one serves."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from contextlib import suppress

import pytest

from tests.serving.engine.server import ABSENT, Server

pytest.importorskip("vllm", reason=ABSENT)


def contents(server: Server) -> dict[str, str]:
    files = (path for path in server.adapters.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_kill_and_restart(server: Server) -> None:
    before, prompt = contents(server), [10, 20, 30]
    spools = server.folder / "cache" / "serving"
    server.complete("p6", prompt)
    (killed,) = spools.iterdir()

    def ask() -> None:
        with suppress(OSError, ValueError):  # the answer that does not come
            server.complete("p6", prompt, 200)

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    time.sleep(0.3)
    server.stop(signal.SIGKILL)
    for thread in asking:
        thread.join()
    assert contents(server) == before and killed.is_dir()
    server.start()
    assert server.complete("p6", prompt) == server.attached("p6", prompt)
    (living,) = spools.iterdir()
    assert living != killed
