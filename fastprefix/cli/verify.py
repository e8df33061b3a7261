"""``fastprefix verify``: check every backend on a device, time those that are right, and remember both for ``auto``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastprefix.cli.options import check_output, positive_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastprefix verify``."""
    parser.add_argument("--device", metavar="DEVICE", help="cuda:1 or so; default the first GPU, else the processor")
    parser.add_argument("--out", metavar="FILE", help="for FASTPREFIX_VERIFY=FILE; default the cache folder's")
    parser.add_argument(
        "--budget", type=positive_number, metavar="SECONDS", help="default 60 on a processor and 90 on a GPU"
    )


def run(options: argparse.Namespace) -> int:
    """Print what was found.

    Returns:
        0; 1 where a backend was wrong, failed, crashed or hung.
    """
    from fastprefix.backends import cuda
    from fastprefix.verification.run import verify

    if options.out is not None:
        out = Path(options.out)
        check_output("--out", str(out.parent))
        if out.is_dir():
            raise ValueError(f"--out: {out} is a folder, expected a file")
    line = _Line()
    try:
        found = verify(options.device, out=options.out, budget=options.budget, progress=line.show)
    finally:
        line.clear()
    print(found)
    if found.table.identity["cuda"] == "none":
        print(f"the backend cuda was not checked: {cuda.absence()}")
    return int(bool(found.wrong))


class _Line:
    """A line on a terminal that the next one overwrites; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
