"""A child process of the verification in which some routes are made wrong, slow, or the end of it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastprefix.verification.checks import worker
from fastprefix.verification.routes import candidate, module
from fastprefix.verification.supervisor import Supervisor

ROOT = Path(__file__).parent.parent.parent
SLOW = 0.02  # seconds
_calls = 0


def command(faults: dict[str, str]) -> Callable[[Supervisor], list[str]]:
    """What ``Supervisor.command`` is replaced by: a child in which each of these routes has a fault."""

    def line(supervisor: Supervisor) -> list[str]:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); "
            "from tests.verification.faulty_worker import main; main(*sys.argv[2:])"
        )
        few = "few" if supervisor.few else "all"
        own = [str(ROOT), json.dumps(faults), str(supervisor.place), str(supervisor.threads), few]
        return [sys.executable, "-c", code, *own]

    return line


def main(faults: str, *rest: str) -> None:
    """Work as ``worker.main`` does, with faults (JSON, by route)."""
    for route, fault in json.loads(faults).items():
        if fault == "no start":
            sys.exit("no device is left")
        if fault == "chatty":
            print("welcome to this machine")
            continue
        chosen = candidate(route)
        _break(module(route.partition(":")[0]), chosen.route, FAULTS[fault])  # type: ignore[arg-type]
    worker.main(*rest)


def _break(backend: Any, route: str | None, fault: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
    for name in ("fwd", "bwd"):
        own = getattr(backend, name)

        def call(*args: Any, own: Any = own) -> Any:
            found = own(*args)
            if args[-1] != route:
                return found
            changed = fault(tuple(found))
            return type(found)(*changed) if hasattr(found, "_fields") else changed

        setattr(backend, name, call)


def _first(change: Callable[[torch.Tensor], None]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Change the first tensor that there is."""

    def fault(found: tuple[Any, ...]) -> tuple[Any, ...]:
        change(next(x for x in found if x is not None and x.numel()))
        return found

    return fault


def _other_sign(x: torch.Tensor) -> None:
    x.neg_()


def _another_time(x: torch.Tensor) -> None:
    global _calls
    _calls += 1
    x.mul_(1 + 2.4e-7 * (_calls % 5))  # two roundings: right by the rule, and never the same twice


def _nan_in_a_row(x: torch.Tensor) -> None:
    x.select(0, 0).select(0, 0).select(0, -1).fill_(float("nan"))


def _segfault(found: Any) -> Any:
    ctypes.string_at(0)


def _hang(found: Any) -> Any:
    while True:
        time.sleep(1)


def _abort(found: Any) -> Any:
    os.write(2, b"LLVM ERROR: Cannot select: intrinsic\n")
    os.abort()


def _raise(found: Any) -> Any:
    raise ValueError("no kernel image")


def _leave(found: Any) -> Any:
    os._exit(0)


def _slow(found: Any) -> Any:
    time.sleep(SLOW)
    return found


def _unwritten(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if x is None else torch.empty_like(x) for x in found)


def _dies_late(found: Any) -> Any:
    """Ends the process at a call that only the rounds of a timing reach."""
    global _calls
    _calls += 1
    return _abort(found) if _calls > 9 else found


def _wrong_when_large(found: tuple[Any, ...]) -> tuple[Any, ...]:
    large = any(x is not None and x.dim() == 4 and x.shape[2] >= 32 for x in found)
    return FAULTS["sign"](found) if large else found


def _raises_when_large(found: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(x is not None and x.dim() == 4 and x.shape[2] >= 32 for x in found):
        raise RuntimeError("out of resource: shared memory")
    return found


def _no_memory(found: Any) -> Any:
    raise RuntimeError("Triton Error [CUDA]: out of memory")


def _killed(found: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _talk(found: Any) -> Any:
    print("a library prints this")
    print("and this", file=sys.stderr)
    return found


FAULTS: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "sign": _first(_other_sign),
    "nan": _first(_nan_in_a_row),
    "another time": _first(_another_time),
    "unwritten": _unwritten,
    "segfault": _segfault,
    "hang": _hang,
    "abort": _abort,
    "exception": _raise,
    "exit": _leave,
    "slow": _slow,
    "talk": _talk,
    "dies late": _dies_late,
    "wrong when large": _wrong_when_large,
    "raises when large": _raises_when_large,
    "no memory": _no_memory,
    "killed": _killed,
}
