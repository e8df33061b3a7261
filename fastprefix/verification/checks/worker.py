"""The child process: reads tasks, one JSON line each, from its input, and writes what becomes of them to its output.

A task is ``{"check": cell, "route": ...}`` or ``{"time": bucket, "routes": [...]}``. Before each call, a line
``{"at": ...}`` says what runs, so that the parent knows it if this process ends or is heard of no more.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TextIO

import torch

from ...machine import device as machine
from ...machine.device_errors import DeviceLostError, describe_error, is_out_of_memory
from ..cells import Cell
from ..table import Bucket
from .bucket_timing import time_routes
from .check import check

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main(device: str, threads: str, few: str) -> None:
    """Work until the input ends. The arguments are a device, a number of threads, and ``few`` for small calls alone."""
    out = _own_output()
    _die_with_parent()
    place = torch.device(device)
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    if place.type in machine.GPUS:  # whose streams and events are those of the current device
        torch.get_device_module(place).set_device(place)
    torch.zeros(1, device=place)
    _send(out, {"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        try:
            _send(out, _answer(task, place, few == "few", lambda label: _send(out, {"at": label})))
        except DeviceLostError as lost:
            _send(out, {"lost": lost.reason})
            out.flush()
            os._exit(1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _send(out, {"skipped": describe_error(error)})


def _answer(task: dict[str, Any], place: torch.device, few: bool, beat: Any) -> dict[str, Any]:
    if "check" in task:
        with torch.no_grad():
            return {"verdict": asdict(check(task["route"], Cell.parse(task["check"]), place, few, beat))}
    with torch.no_grad():
        times, bad = time_routes(Bucket.parse(task["time"]), task["routes"], place, beat)
    return {"times": times, "bad": bad}


def _own_output() -> TextIO:
    """What was standard output; whatever libraries print goes to standard error from now on."""
    own = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return own


def _send(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _die_with_parent() -> None:
    """A parent that is killed cannot end a child that hangs; the kernel can. No core is left of one that crashes."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
