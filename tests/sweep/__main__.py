"""``python -m tests.sweep``: check every class that has not been, then make the table."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.sweep import table
from tests.sweep.outcome import RED

RESULTS = Path(__file__).parents[2] / "build" / "sweep.jsonl"


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The last result of each class, in the transformers that is installed."""
    if not path.exists():
        return {}
    every = map(json.loads, path.read_text().splitlines())
    return {found["class"]: found for found in every if found.get("transformers") == version("transformers")}


def is_red(found: dict[str, Any]) -> bool:
    """Whether a class has a red check."""
    return any(check["outcome"] in RED for check in found["checks"].values())


def main() -> int:
    """Run the sweep; the exit code says whether a class is red."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="classes whose name it is found in")
    parser.add_argument("--again", action="store_true", help="classes that have a result, too")
    parser.add_argument("--failed", action="store_true", help="again those that were red, not built or not run")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which the rest is left for another call")
    parser.add_argument("--table", action="store_true", help="only make docs/models.md from the results there are")
    options = parser.parse_args()
    if not options.table:
        sweep(options)
    table.write(read())
    return 1 if any(map(is_red, read().values())) else 0


def sweep(options: argparse.Namespace) -> None:
    """Check the classes that are due."""
    from tests.sweep.models.classes import found
    from tests.sweep.pool import Worker

    known = read()
    due = [name for name in found() if re.search(options.only, name)]
    if options.failed:
        due = [
            name
            for name in due
            if name in known and (is_red(known[name]) or {"not built", "not run"} & set(known[name]))
        ]
    elif not options.again:
        due = [name for name in due if name not in known]
    RESULTS.parent.mkdir(exist_ok=True)
    worker, begun = Worker(), time.monotonic()
    with RESULTS.open("a") as file:
        for i, name in enumerate(due):
            if time.monotonic() - begun > 60 * options.minutes:
                print(f"{len(due) - i} classes left for another call")
                break
            result = {**worker.check(name), "date": time.strftime("%Y-%m-%d"), "transformers": version("transformers")}
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{i + 1}/{len(due)} {name}: {_short(result)}", flush=True)
    worker.close()


def _short(result: dict[str, Any]) -> str:
    if "checks" not in result or not result["checks"]:
        return result.get("not built") or result.get("not run") or ""
    return ", ".join(f"{kind} {check['outcome']}" for kind, check in result["checks"].items())


if __name__ == "__main__":
    sys.exit(main())
