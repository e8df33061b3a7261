"""One command for a CUDA machine: is every backend right there, and how fast is it.

    python -m benches.device [--smoke] [--budget SECONDS] [--out DIR] [--resume]

Correctness first, then the operator against every peer, then whole training steps, the most important rows first.
Each row is on disk as soon as it is measured. ``--smoke`` runs tiny shapes on any machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from benches.plan import Job, jobs
from benches.report import markdown
from benches.suite import Suite
from benches.work import do, kind
from fastprefix.measure.run import DeviceLostError
from fastprefix.measure.tables import write_atomically

BUDGET = 420.0
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Run the suite.

    Returns:
        0; 1 when something of ours is wrong or failed; 2 without a CUDA device, unless ``--smoke``.
    """
    options = _parser().parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        print("benches.device: no CUDA device here; --smoke runs anywhere", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminated)
    if options.smoke and options.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _run(options, Path(folder), device)
    return _run(options, options.out or RESULTS, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.device", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any machine; no results without --out")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benches/results")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run and do the rest")
    return parser


def _run(options: argparse.Namespace, out: Path, device: str) -> int:
    suite = Suite(out, device, options.budget, options.resume)
    try:
        for job in jobs(device, options.smoke):
            if suite.done(kind(job), job.key):
                continue
            if suite.out_of_budget:
                suite.dropped.append(job.key)
                continue
            row = _row(job, suite, options.smoke, out)
            print(f"{suite.spent:6.1f} s  {job.key:<52} {_summary(row)}", flush=True)
    except (KeyboardInterrupt, SystemExit):
        suite.end()
        raise
    finally:
        write_atomically(suite.folder / "results.md", markdown(suite))
    suite.finish()
    bad = sum(row["bad"] for rows in suite.files.values() for row in rows.rows)
    print(markdown(suite))
    if suite.dropped:
        print(f"budget of {suite.budget:.0f} s spent: {len(suite.dropped)} of the least important rows dropped")
    print(f"{'something is wrong: ' + str(bad) if bad else 'all right'}; results in {suite.folder}")
    return int(bad > 0)


def _row(job: Job, suite: Suite, smoke: bool, out: Path) -> dict[str, Any]:
    try:
        row = do(job, suite, smoke)
    except DeviceLostError as lost:
        suite.blame(job.key, lost.who, f"lost the device: {lost.reason}")
        _again(suite, smoke, out)
    suite.add(kind(job), row)
    return row


def _again(suite: Suite, smoke: bool, out: Path) -> NoReturn:
    """A CUDA fault ends the process's use of the device: go on in a new one, from what is on disk."""
    print("the device was lost; going on in a new process", flush=True)
    options = ["--resume", "--out", str(out), "--budget", str(suite.budget), *(["--smoke"] if smoke else [])]
    os.execv(sys.executable, [sys.executable, "-m", "benches.device", *options])


def _terminated(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _summary(row: dict[str, Any]) -> str:
    if "cases" in row:
        verdicts = list(row["cases"].values())
        return "; ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    times = row.get("peers") or row.get("steps") or {}
    told = [f"{name} {1e3 * x['median_s']:.3g} ms" for name, x in times.items()]
    return ", ".join(told) + (f"; {row['bad']} BAD" if row["bad"] else "")


if __name__ == "__main__":
    sys.exit(main())
