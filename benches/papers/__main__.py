"""``python -m benches.papers``: run the experiments, keep what they found, and write ``docs/papers.md``."""

from __future__ import annotations

import argparse
import os
import sys
import time

from benches.papers.agreement import disagreements
from benches.papers.collection import experiments
from benches.papers.experiment import Experiment
from benches.papers.page import PAGE, draw, write_page
from benches.papers.runner import ROOT, path_of, read, run, write


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a later run does not agree with the kept one."""
    parser = argparse.ArgumentParser(prog="python -m benches.papers", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these experiments in place of all")
    parser.add_argument(
        "--check", action="store_true", help="keep nothing; say whether this run agrees with the kept one"
    )
    parser.add_argument("--full", action="store_true", help="the papers' own sizes, where an experiment has one")
    parser.add_argument("--draw", action="store_true", help="run nothing; pictures and the page from the kept results")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="side by side, a thread each; default 2")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes: got {options.processes}, expected at least 1")
    if options.draw and (options.check or options.full):
        parser.error("--draw runs nothing, so that it goes with neither --check nor --full")
    try:
        chosen = [x for x in experiments(options.only) if x.full or not options.full]
    except ValueError as error:
        parser.error(str(error))
    if not chosen:
        parser.error("none of these experiments has a full size")
    if options.draw:
        return _draw([x.name for x in chosen])
    return _check(chosen, options) if options.check else _keep(chosen, options)


def _keep(chosen: list[Experiment], options: argparse.Namespace) -> int:
    began = time.monotonic()
    by_name = {x.name: x for x in chosen}
    for found in run(chosen, options.full, options.processes):
        write(found)
        if not options.full:
            draw(by_name[found.name], found)
        print(
            f"{found.name}: {sum(found.seconds):.0f} s of a core, {time.monotonic() - began:.0f} s since the start",
            flush=True,
        )
    write_page()
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def _check(chosen: list[Experiment], options: argparse.Namespace) -> int:
    if missing := [x.name for x in chosen if not path_of(x.name, options.full).is_file()]:
        print(f"no kept results of {', '.join(missing)}: run without --check first", file=sys.stderr)
        return 1
    by_name = {x.name: x for x in chosen}
    failed = False
    for found in run(chosen, options.full, options.processes):
        said = disagreements(by_name[found.name], read(path_of(found.name, options.full)), found)
        failed |= bool(said)
        print(f"{found.name}: {'agrees' if not said else 'DIFFERS'}", *said, sep="\n  ", flush=True)
    return int(failed)


def _draw(names: list[str]) -> int:
    for x in experiments(names):
        if path_of(x.name).is_file():
            draw(x, read(path_of(x.name)))
    write_page()
    return 0


if __name__ == "__main__":
    # The processes of the runs keep memory for their next tensors, which glibc would give back and ask for again.
    for setting in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(setting, str(2**33))
    sys.exit(main())
