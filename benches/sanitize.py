"""Every Triton kernel once, on tiny shapes, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck|racecheck|initcheck python -m benches.sanitize [--smoke]

It runs training, decoding, the epilogue after a vendor kernel, and every argument of the operator, in fp16, forward and
backward, and checks results by the error rule. The first run compiles some hundred kernels, later runs find them in the
cache. ``--smoke`` runs a part of it in Triton's interpreter, for which TRITON_INTERPRET=1 has to be set.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benches.device_suite.operator_calls import CALLS, Call
from benches.device_suite.operator_correctness import Case, verdict
from fastprefix.backends import aten_routes
from fastprefix.measure import Problem
from fastprefix.measure.operator.correctness import broken_rule, results
from fastprefix.types import AttentionArgs

PROBLEMS = (
    Problem.train(2, 4, 2, 13, 7, 16),
    Problem.train(2, 6, 2, 19, 40, 32),
    Problem.train(1, 2, 2, 33, 0, 64),
    Problem.decode(3, 4, 2, 19, 37, 16),
    Problem.decode(1, 4, 2, 300, 530, 16),
)
SMOKE = ("bank by row", "decode, bank", "everything")


def main(argv: list[str] | None = None) -> int:
    """Run every call once.

    Returns:
        0; 1 when a result is wrong, a call failed or a kernel was never launched; 2 where kernels cannot run.
    """
    parser = argparse.ArgumentParser(prog="python -m benches.sanitize", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="in Triton's interpreter, on any machine")
    options = parser.parse_args(argv)
    if not (torch.cuda.is_available() or (options.smoke and os.environ.get("TRITON_INTERPRET") == "1")):
        print("benches.sanitize: no CUDA device here; --smoke with TRITON_INTERPRET=1 interprets", file=sys.stderr)
        return 2
    # In a caching allocator a read past the end finds the next block, which hides it from memcheck.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    bad = 0
    with counted() as launched, short_prefixes():
        for label, judge in _cases("cuda" if torch.cuda.is_available() else "cpu", options.smoke):
            said = verdict(judge)
            bad += not said.startswith(("ok", "cannot"))
            print(f"{label:<40} {said}", flush=True)
    for kernel in sorted(kernels()):
        print(f"{kernel:<40} {launched.get(kernel, 0)} launches")
    missing = sorted(kernels() - set(launched))
    if missing:
        print(f"never launched: {', '.join(missing)}")
    return int(bool(bad or missing))


def kernels() -> set[str]:
    """The names of all shipped kernels."""
    from fastprefix import _triton

    trees = (ast.parse(path.read_text()) for path in Path(_triton.__path__[0]).glob("*.py"))
    functions = (node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef))
    return {node.name for node in functions if node.name.endswith("_kernel")}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the launches of each kernel inside the block."""
    from fastprefix.backends.launch import launcher

    found: dict[str, int] = {}
    launch = launcher.launch

    def count(kernel: Any, *args: Any, **options: Any) -> None:
        found[kernel.__name__] = found.get(kernel.__name__, 0) + 1
        launch(kernel, *args, **options)

    with mock.patch.object(launcher, "launch", count):
        yield found


@contextmanager
def short_prefixes() -> Iterator[None]:
    """Inside the block, the aten backend leaves short prefixes to the epilogue kernels on CPUs too."""
    with mock.patch.object(aten_routes, "SHORT_ON", ("cuda", "cpu")):
        yield


def _cases(device: str, smoke: bool) -> Iterator[Case]:
    plain = {problem.label.rpartition(" ")[0]: Call(problem, lambda problem, generator: {}) for problem in PROBLEMS}
    arguments = {name: CALLS[name].small() for name in (SMOKE if smoke else CALLS)}
    for name, call in {**plain, **arguments}.items():
        call = replace(call, problem=replace(call.problem, dtype=torch.float16, device=device))
        yield name, partial(_broken, "triton", call)
        if call.problem.S == 1:
            yield f"split: {name}", partial(_split, call)
        if call.problem.P:
            yield f"epilogue: {name}", partial(_broken, "aten", call)


def _broken(backend: str, call: Call) -> str | None:
    leaves, options = call.build()
    options["causal"] = call.problem.causal
    return broken_rule(call.problem, leaves, results(leaves, backend=backend, **options), options)


def _split(call: Call) -> str | None:
    """Call split-KV decoding directly, since so few keys would not be split otherwise."""
    from fastprefix.backends.launch import split_kv_decode

    leaves, options = call.build()
    inputs: dict[str, Any] = {name: x.detach() for name, x in leaves.inputs.items()}
    o, lse = split_kv_decode.fwd(AttentionArgs(**{"scale": call.problem.D**-0.5, **inputs, **options}))
    return broken_rule(call.problem, leaves, {"o": o, "lse": lse}, options)


if __name__ == "__main__":
    sys.exit(main())
