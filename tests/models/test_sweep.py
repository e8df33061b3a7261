"""The sweep over transformers' classes: what is right comes out right, and what is broken on purpose comes out red."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from fastprefix.hf.attention import position_ids as positions
from tests.sweep import table
from tests.sweep.__main__ import is_red
from tests.sweep.models.classes import found
from tests.sweep.pool import Worker
from tests.sweep.precision import Fp64
from tests.sweep.worker import check


@pytest.fixture(autouse=True)
def fp64() -> Iterator[None]:
    """As in the sweep's own process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Fp64():
            yield
    finally:
        torch.set_default_dtype(before)


def outcomes(name: str) -> dict[str, str]:
    return {kind: found["outcome"] for kind, found in check(name)["checks"].items()}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel"])
def test_what_is_right_is_right_in_every_check(name: str) -> None:
    result = check(name)
    assert set(outcomes(name).values()) == {"right"} and not is_red(result)
    assert {"text", "padded"} <= set(result["cases"])


def test_what_is_refused_says_why() -> None:
    result = check("BloomForCausalLM")["checks"]["prefix"]
    assert (
        result["outcome"] == "refused" and "does not go through transformers' attention interface" in result["message"]
    )


def test_positions_that_do_not_move_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    own = positions.content_positions

    def broken(kwargs: Any, offset: Any, *rest: Any) -> Any:
        return own(kwargs, offset * 0, *rest)

    monkeypatch.setattr(positions, "content_positions", broken)
    result = check("LlamaForCausalLM")
    assert result["checks"]["prefix"]["outcome"] == "differs" and is_red(result)
    assert result["checks"]["prefix"]["cases"]["text"] == "right"  # without an offset there is nothing to move
    assert result["checks"]["prompt"]["outcome"] == "differs"


def test_an_error_after_attach_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    own = positions.content_positions

    def broken(kwargs: Any, *rest: Any) -> Any:
        found = own(kwargs, *rest)
        if found.shape[-1] > 4:  # attach itself runs the model on a few tokens
            raise ValueError("position_ids: got none, expected some")
        return found

    monkeypatch.setattr(positions, "content_positions", broken)
    result = check("LlamaForCausalLM")["checks"]
    assert {result[kind]["outcome"] for kind in ("prefix", "prompt")} == {"raised later"}
    assert "position_ids: got none" in result["prefix"]["message"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [("import sys; sys.exit(3)", "ended with 3"), ("input(); import time; time.sleep(99)", "no answer in 0 s")],
)
def test_a_class_that_ends_its_process_does_not_end_the_sweep(
    script: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.sweep.pool.IMPORTS", 0.5)
    worker = Worker(timeout=0.1, command=(sys.executable, "-c", script))
    assert reason in worker.check("Any")["not run"]
    assert worker.process is None


@pytest.mark.slow
def test_every_exported_class_is_found_once() -> None:
    classes = found()
    assert len(classes) > 1500 and {"LlamaForCausalLM", "LlavaForConditionalGeneration", "ViTModel"} <= set(classes)
    assert next(iter(classes)).endswith("ForCausalLM")


def test_the_document_is_made_from_the_results() -> None:
    results = json.loads(table.RESULTS.read_text())
    assert table.DOCS.read_text() == table.text(results), "python -m tests.sweep --table"
    assert len(table.RESULTS.read_text()) < 200_000
