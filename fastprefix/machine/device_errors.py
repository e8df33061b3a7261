"""Errors of the code that is measured: their text in one line, and whether the device still works after one."""

from __future__ import annotations

import torch

from . import device


class DeviceLostError(RuntimeError):
    """The device does not respond in this process any more; ``who`` was running."""

    def __init__(self, who: str, reason: str) -> None:
        super().__init__(f"{who}: {reason}")
        self.who, self.reason = who, reason


def describe_error(error: BaseException) -> str:
    """An exception as one short line."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory, of a device or of the machine: another time there may be."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return any(told in text for told in ("out of memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc"))


def synchronize(place: torch.device | str) -> None:
    """Wait until the device has finished its work, and raise any error of it."""
    device.synchronize(torch.device(place))


def recover(place: torch.device | str, who: str, failure: str | None) -> None:
    """After a failure, free cached memory and check that the device still responds.

    Raises:
        DeviceLostError: it does not respond.
    """
    if failure is None:
        return
    try:
        device.synchronize(torch.device(place))
        device.empty_cache(torch.device(place))
    except Exception as error:
        raise DeviceLostError(who, failure or describe_error(error)) from error
