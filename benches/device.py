"""One command for a CUDA machine: is every backend right there, and how fast is it.

    python -m benches.device [--smoke] [--only PART] [--budget SECONDS] [--out DIR] [--resume] [--list]

It begins with ``fastprefix verify``, so that ``auto`` takes what is right and fast there. Then it checks correctness
on larger shapes, times the operator against every baseline, then whole training steps, the most important rows first.
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

from benches.device_suite import compiled_kernels, time_estimate
from benches.device_suite.job_runner import run_job
from benches.device_suite.parallel_compile import MOST_PROCESSES, CompilePool, this_device
from benches.device_suite.plan import PARTS, Job, ModelCheck, OperatorCheck, jobs, part
from benches.device_suite.report import markdown
from benches.device_suite.suite_state import SuiteState
from fastprefix.machine.device_errors import DeviceLostError, describe_error
from fastprefix.machine.files import write_atomically
from fastprefix.verification.run import verify

BUDGET = 460.0
SMOKE_VERIFY = 3.0  # seconds of checks where every part runs for show
RESULTS = Path(__file__).parent / "results"
LISTED = (90, "NVIDIA H100 80GB HBM3")  # the device that --list assumes where there is none


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
    suite = SuiteState(out, device, options.budget, options.resume, options.only)
    plan = [job for job in jobs(device, options.smoke, options.only) if not suite.done(part(job), job.key)]
    try:
        if "correctness" in options.only and not (options.resume or suite.out_of_budget):
            _verify(suite, device, options.smoke)
        with _compilers(plan, device, options.smoke) as compilers:
            for job in plan:
                if suite.out_of_budget:
                    suite.dropped.append(job.key)
                    continue
                if compilers is not None and _needs_kernels(job) and (note := compilers.wait()):
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


def _verify(suite: SuiteState, device: str, smoke: bool) -> None:
    """Have every backend prove itself, and keep what was found beside the other results."""
    file = suite.folder / "verified.json"
    try:
        found = verify(device, budget=SMOKE_VERIFY if smoke else None, out=file if smoke else None)
    except OSError as error:
        print(f"{suite.spent:6.1f} s  verify: {describe_error(error)}", flush=True)
        return
    write_atomically(file, found.table.to_json())
    print(f"{found}\n{suite.spent:6.1f} s  verified", flush=True)


def _compilers(plan: list[Job], device: str, smoke: bool) -> contextlib.AbstractContextManager[CompilePool | None]:
    """The processes that compile the kernels; None where there are none or that fails: then rows compile them."""
    if device != "cuda" or smoke:
        return contextlib.nullcontext()
    try:
        return CompilePool(plan, this_device())
    except Exception as error:
        print(f"kernels are compiled one by one: {describe_error(error)}", flush=True)
        return contextlib.nullcontext()


def _needs_kernels(job: Job) -> bool:
    """Whether a row waits for the compiled kernels: it is timed, or it runs Triton kernels."""
    return not isinstance(job, (OperatorCheck, ModelCheck)) or job.backend == "triton"


def _listing(plan: list[Job], budget: float) -> str:
    lines = [time_estimate.listing(plan)]
    total = time_estimate.START + sum(map(time_estimate.seconds, plan))
    found, reasons = compiled_kernels.distinct_kernels(compiled_kernels.meta_calls(plan), LISTED)
    one_by_one, at_once = (time_estimate.compilation(len(found), n) for n in (1, MOST_PROCESSES))
    lines.append(
        f"{len(found)} Triton kernels: {one_by_one:.0f} s one by one, {at_once:.0f} s in {MOST_PROCESSES} "
        "processes, beside the rows before the first that needs them"
    )
    if reasons:
        errors = dict.fromkeys(reason.partition(": ")[2] for reason in reasons)
        lines.append(f"{len(reasons)} calls cannot be made: {'; '.join(errors)}")
    lines.append(f"{len(plan)} rows, about {total:.0f} s of a budget of {budget:.0f} s")
    return "\n".join(lines)


def _row(job: Job, suite: SuiteState, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    try:
        row = run_job(job, suite, options.smoke)
    except DeviceLostError as lost:
        suite.blame(job.key, lost.who, f"lost the device: {lost.reason}")
        _restart(suite, options, out)
    suite.add(part(job), row)
    write_atomically(suite.folder / "results.md", markdown(suite))
    return row


def _restart(suite: SuiteState, options: argparse.Namespace, out: Path) -> NoReturn:
    """Go on in a new process from the state on disk, since after a CUDA fault this one cannot use the device."""
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
