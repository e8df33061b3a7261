"""The README cannot lie: its tables are generated, and its snippets run."""

from __future__ import annotations

import re

from tests.support_table import README, fill


def test_generated_tables_are_current() -> None:
    text = README.read_text()
    assert fill(text) == text, "run python -m tests.support_table"


def test_the_operator_snippet_runs() -> None:
    """The Python block that makes its own tensors, as printed."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    snippet = next(b for b in blocks if b.startswith("import torch"))
    exec(compile(snippet, "README.md", "exec"), {})


def test_measured_figures_are_those_on_disk() -> None:
    from benches.readme import fill as fill_measured

    text = README.read_text()
    assert fill_measured(text) == text, "run python -m benches.readme"
