"""Errors of the code that is measured: their text in one line, and whether the device still works after one."""

from __future__ import annotations

import torch


class DeviceLostError(RuntimeError):
    """The device answers nothing any more in this process; ``who`` was running."""

    def __init__(self, who: str, reason: str) -> None:
        super().__init__(f"{who}: {reason}")
        self.who, self.reason = who, reason


def describe_error(error: BaseException) -> str:
    """An exception as one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all it was given, and raise what went wrong there."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def recover(device: torch.device | str, who: str, failure: str | None) -> None:
    """After a failure, give cached memory back and see whether the device still answers.

    Raises:
        DeviceLostError: it does not.
    """
    if failure is None or torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLostError(who, failure or describe_error(error)) from error
