"""The pytest plugin: PEFT's tests on local models, patched or not, each with a record of what happened.

The mode comes in the environment, which pytest-xdist hands to its workers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.peft_suite import patching, selection, stubs, unskipped
from tests.peft_suite.source import PACKAGE

PATCHED = "FASTPREFIX_PEFT_SUITE_PATCHED"  # "1": every PeftModel goes through fastprefix.patch
OUTPUT = "FASTPREFIX_PEFT_SUITE_OUTPUT"  # the file for the records
_KEY = "fastprefix"


class Suite:
    """The hooks, and what is told from one to the next."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.records: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.others = 0
        self.broken: dict[str, str] = {}

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if isinstance(collector, pytest.Class):
            unskipped.add_counterpart(collector.obj)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        keep: list[pytest.Item] = []
        for item in items:
            if unskipped.redundant(item):
                continue
            if not selection.selected(item):
                self.others += 1
            elif reason := selection.cannot_run(item):
                self.left_out[_name(item.nodeid)] = reason
            else:
                keep.append(item)
        items[:] = keep

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        patching.begin()
        # Many draw without a seed: both runs are to see the same numbers.
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with unskipped.running(item) as limits:
            try:
                return (yield)
            finally:
                item.user_properties.append((_KEY, {**patching.seen(), "lifted": limits}))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken[_name(report.nodeid)] = str(report.longrepr)[-600:]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = _outcome(report)
        if outcome is None:
            return
        record = {"outcome": outcome, **dict(report.user_properties).get(_KEY, {})}
        if outcome in ("failed", "error", "skipped"):
            record["why"] = _why(report)
        self.records[_name(report.nodeid)] = record

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput[_KEY] = {"left_out": self.left_out, "others": self.others}
        elif output := os.environ.get(OUTPUT):
            told = {"left_out": self.left_out, "others": self.others, "broken": self.broken}
            Path(output).write_text(json.dumps({"tests": self.records, **told}))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        # Under xdist the workers collect, each of them everything.
        told = getattr(node, "workeroutput", {}).get(_KEY, {})
        self.left_out.update(told.get("left_out", {}))
        self.others = max(self.others, told.get("others", 0))


def _name(nodeid: str) -> str:
    return nodeid.removeprefix(f"{PACKAGE}/")


def _outcome(report: pytest.TestReport) -> str | None:
    """What a phase says about the test; the phases that only went well before and after it say nothing."""
    if hasattr(report, "wasxfail"):
        return "xpassed" if report.passed else "xfailed"
    if report.when == "call" or report.skipped:
        return report.outcome
    return "error" if report.failed else None


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    where = f" ({Path(crash.path).name}:{crash.lineno})" if crash else ""
    return (crash.message if crash else str(report.longrepr))[:600] + where


def pytest_configure(config: pytest.Config) -> None:
    stubs.install()
    # Theirs goes online for a name's first use; here no name is ever looked up.
    utils = importlib.import_module(f"{PACKAGE}.testing_utils")
    utils.hub_online_once = lambda name: contextlib.nullcontext()
    if os.environ.get(PATCHED) == "1":
        patching.install()
    unskipped.install()
    config.pluginmanager.register(Suite(config), "fastprefix-peft-suite")
