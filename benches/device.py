"""One command for a CUDA machine: is every backend right there, and how fast is it.

    python -m benches.device [--smoke] [--only PART] [--budget SECONDS] [--out DIR] [--resume] [--list]

Correctness first, then the operator against every peer, then whole training steps, the most important rows first.
Each row is on disk as soon as it is measured. ``--smoke`` runs tiny shapes on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from benches import estimate, kernels
from benches.compilers import MOST_PROCESSES, Compilers, this_device
from benches.plan import PARTS, Check, Equal, Job, jobs, part
from benches.report import markdown
from benches.suite import Suite
from benches.work import do
from fastprefix.measure.device_errors import DeviceLostError, describe_error
from fastprefix.measure.report_tables import write_atomically

BUDGET = 420.0
RESULTS = Path(__file__).parent / "results"
LISTED = (90, "NVIDIA H100 80GB HBM3")  # --list speaks of it where there is no device


def main(argv: list[str] | None = None) -> int:
    """Run the suite.

    Returns:
        0; 1 when something of ours is wrong or failed; 2 without a CUDA device, unless ``--smoke`` or ``--list``.
    """
    options = _parser().parse_args(argv)
    options.only = tuple(options.only or PARTS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.list:
        print(_listing(jobs("cuda", options.smoke, options.only), options.budget))
        return 0
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
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable; other results are kept")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benches/results")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run and do the rest")
    parser.add_argument("--list", action="store_true", help="say what would run, in order, and how long it may take")
    return parser


def _run(options: argparse.Namespace, out: Path, device: str) -> int:
    suite = Suite(out, device, options.budget, options.resume, options.only)
    plan = [job for job in jobs(device, options.smoke, options.only) if not suite.done(part(job), job.key)]
    try:
        with _compilers(plan, device, options.smoke) as compilers:
            for job in plan:
                if suite.out_of_budget:
                    suite.dropped.append(job.key)
                    continue
                if compilers is not None and _compiled_before(job) and (note := compilers.wait()):
                    suite.notes.append(note)
                    print(f"{suite.spent:6.1f} s  {note}", flush=True)
                row = _row(job, suite, options, out)
                print(f"{suite.spent:6.1f} s  {job.key:<52} {_summary(row)}", flush=True)
    except (KeyboardInterrupt, SystemExit):
        suite.end()
        raise
    finally:
        write_atomically(suite.folder / "results.md", markdown(suite))
    suite.finish()
    bad = sum(row["bad"] for name in options.only for row in suite.rows(name))
    print(markdown(suite))
    if suite.dropped:
        print(f"budget of {suite.budget:.0f} s spent: {len(suite.dropped)} of the least important rows dropped")
    print(f"{'something is wrong: ' + str(bad) if bad else 'all right'}; results in {suite.folder}")
    return int(bad > 0)


def _compilers(plan: list[Job], device: str, smoke: bool) -> contextlib.AbstractContextManager[Compilers | None]:
    """Whoever compiles the kernels; nobody where there are none, or that fails: then rows do it themselves."""
    if device != "cuda" or smoke:
        return contextlib.nullcontext()
    try:
        return Compilers(plan, this_device())
    except Exception as error:
        print(f"kernels are compiled one by one: {describe_error(error)}", flush=True)
        return contextlib.nullcontext()


def _compiled_before(job: Job) -> bool:
    """Whether a row is timed or runs our kernels first."""
    return not isinstance(job, (Check, Equal)) or job.backend == "triton"


def _listing(plan: list[Job], budget: float) -> str:
    lines = [estimate.listing(plan)]
    total = estimate.START + sum(map(estimate.seconds, plan))
    found, reasons = kernels.distinct(kernels.sources(plan), LISTED)
    one_by_one, at_once = (estimate.compilation(len(found), n) for n in (1, MOST_PROCESSES))
    lines.append(
        f"{len(found)} Triton kernels: {one_by_one:.0f} s one by one, {at_once:.0f} s in {MOST_PROCESSES} "
        "processes, beside the rows before the first that needs them"
    )
    if reasons:
        errors = dict.fromkeys(reason.partition(": ")[2] for reason in reasons)
        lines.append(f"{len(reasons)} calls cannot be made: {'; '.join(errors)}")
    lines.append(f"{len(plan)} rows, about {total:.0f} s of a budget of {budget:.0f} s")
    return "\n".join(lines)


def _row(job: Job, suite: Suite, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    try:
        row = do(job, suite, options.smoke)
    except DeviceLostError as lost:
        suite.blame(job.key, lost.who, f"lost the device: {lost.reason}")
        _again(suite, options, out)
    suite.add(part(job), row)
    write_atomically(suite.folder / "results.md", markdown(suite))
    return row


def _again(suite: Suite, options: argparse.Namespace, out: Path) -> NoReturn:
    """A CUDA fault ends the process's use of the device: go on in a new one, from what is on disk."""
    print("the device was lost; going on in a new process", flush=True)
    more = ["--resume", "--out", str(out), "--budget", str(suite.budget), *(["--smoke"] if options.smoke else [])]
    for name in options.only:
        more += ["--only", name]
    os.execv(sys.executable, [sys.executable, "-m", "benches.device", *more])


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
