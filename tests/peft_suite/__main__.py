"""Runs PEFT's own tests, as they are and through ``fastprefix.patch``; 1 if any is worse with the patch.

python -m tests.peft_suite [--only test_cartridge.py] [-k EXPRESSION] [--unpatched-only] [--json FILE] [-n 2]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from tests.peft_suite import models, plugin, report, source
from tests.peft_suite.selection import FILES


def main() -> int:
    """Download, make the models, run, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="FILE", choices=FILES, help="one of PEFT's test files")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="as pytest takes it")
    parser.add_argument("-n", metavar="PROCESSES", type=int, default=0, help="as pytest-xdist takes it")
    parser.add_argument("--unpatched-only", action="store_true", help="PEFT as it is")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    began = time.monotonic()
    folder = source.cache_folder()
    home = source.unpack(source.download(folder))
    transformers.utils.logging.disable_progress_bar()
    hub = models.write_hub(folder, source.hub_names(home, FILES))
    files = (arguments.only,) if arguments.only else FILES
    options = ["-k", arguments.k, "-n", str(arguments.n)]
    plain = run(home, hub, files, options, patched=False)
    patched = None if arguments.unpatched_only else run(home, hub, files, options, patched=True)
    content = {
        "versions": {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")},
        "seconds": round(time.monotonic() - began),
        **report.summary(plain, patched),
    }
    print(", ".join(f"{name} {number}" for name, number in content["versions"].items()), f"{content['seconds']} s\n")
    print(report.text(content))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(bool(content["worse"] or content["broken"]))


def run(home: Path, hub: Path, files: tuple[str, ...], options: list[str], *, patched: bool) -> dict[str, Any]:
    """One pytest session over the files, in a process of its own: its tests' records."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "records.json"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(source.ROOT), str(home), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(hub),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            plugin.PATCHED: "1" if patched else "",
            plugin.OUTPUT: str(output),
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-header", "-p", "tests.peft_suite.plugin"]
        # Without PEFT's options: they measure coverage and make errors of the warnings that newer transformers give.
        command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(home), "--disable-warnings"]
        command += [*options, *(f"{source.PACKAGE}/{file}" for file in files)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        if not output.exists() or done.returncode not in (0, 1, 5):  # 5: nothing was selected
            raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        print(f"{'patched' if patched else 'unpatched'}: {done.stdout.strip().splitlines()[-1]}", file=sys.stderr)
        records: dict[str, Any] = json.loads(output.read_text())
        return records


if __name__ == "__main__":
    sys.exit(main())
