"""What the command line says before it does anything: numbers in plain words, and no messages of libraries."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fastprefix import cli
from fastprefix.cli.quiet_imports import quiet_imports
from tests.support.tiny_models import save_tiny


@pytest.mark.slow
def test_commands_are_quiet(tmp_path: Path) -> None:
    """Nothing of what importing transformers, torchao among it, has to say."""
    folder = save_tiny(tmp_path / "model")
    words = [sys.executable, "-m", "fastprefix.cli", "explain", "--model", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("prefix 'default': active") and not done.stderr


def test_other_messages_of_the_same_libraries_pass(caplog: pytest.LogCaptureFixture) -> None:
    torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    before = [list(logger.filters) for logger in (torchao, pytree)]
    with quiet_imports(), caplog.at_level(logging.WARNING):
        torchao.warning("Failed to load some.so: for another Python")
        torchao.warning("something else")
        pytree.warning("%s is an Enum subclass and is now natively supported by torch.compile", "Kind")
        pytree.warning("something else")
    assert [record.name for record in caplog.records] == ["torchao", "torch.utils._pytree"]
    assert [logger.filters for logger in (torchao, pytree)] == before


NUMBERS = [
    ("train --model m --data d --output o --lr abc", "--lr: got 'abc', expected a positive number"),
    ("train --model m --data d --output o --lr inf", "--lr: got 'inf', expected a positive number"),
    ("train --model m --data d --output o --epochs -1", "--epochs: got '-1', expected a positive number"),
    (
        "train --model m --data d --output o --max-steps 1.5",
        "--max-steps: got '1.5', expected a whole number",
    ),
    ("train --model m --data d --output o --seed -1", "--seed: got -1, expected 0 to 4294967295"),
    ("train --model m --data d --output o --num-virtual-tokens 0", "--num-virtual-tokens: got 0, expected at least 1"),
    ("generate a --max-new-tokens many", "--max-new-tokens: got 'many', expected a whole number, at least 1"),
    ("explain --model m --num-virtual-tokens x", "--num-virtual-tokens: got 'x', expected a whole number, at least 1"),
    ("demo --steps few", "--steps: got 'few', expected a whole number, at least 1"),
    ("memory --batch x", "--batch: got 'x', expected a whole number, at least 1"),
    ("bench --repeats x", "--repeats: got 'x', expected a whole number, at least 1"),
    ("bench --shape a,b", "--shape: got 'a,b', expected six whole numbers B,H,H_kv,S,P,D "),
    ("bench --shape 1,3,2,8,4,16", "expected six whole numbers B,H,H_kv,S,P,D: problem: H = 3 is no multiple"),
]


@pytest.mark.parametrize(("words", "message"), NUMBERS)
def test_numbers_in_plain_words(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == cli.USER_ERROR
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ") and "invalid" not in error
