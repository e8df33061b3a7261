"""Training steps beside each other, and the two commands that measure."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch

from fastprefix.types import BACKENDS


def _options(add: Callable[[argparse.ArgumentParser], None], *args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(args)


def test_the_bench_command(capsys: pytest.CaptureFixture[str]) -> None:
    from fastprefix.cli.bench import add_arguments, run

    peers = ("--peer", "ours", "--peer", "cat_mask")
    assert run(_options(add_arguments, "--shape", "2,4,2,16,8,16", "--repeats", "2", *peers)) == 0
    out = capsys.readouterr().out
    assert "B2 H4/2 S16 P8 D16 fp32, forward and backward; floor" in out and out.count("cat_mask ") == 2
    assert run(_options(add_arguments, "--decode", "--shape", "2,4,2,16,8,16", "--markdown")) == 0
    assert "| cache_packed |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--peer nobody: expected one of ours.*, cat_mask"):
        run(_options(add_arguments, "--peer", "nobody"))
    with pytest.raises(SystemExit):
        _options(add_arguments, "--shape", "2,4,3,16,8,16")


@pytest.mark.slow
def test_the_memory_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    from fastprefix.cli.memory import add_arguments, run

    sizes = ("--batch", "2", "--seq", "16", "--prefix", "8", "--prefix", "64")
    assert run(_options(add_arguments, *sizes)) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["0", "8", "64"]
    ours, peft = ([float(row[column]) for row in rows] for column in (1, 3))
    assert ours == [ours[0]] * 3, "the prefix is a parameter: nothing of it is saved"
    assert peft[2] > peft[1] > peft[0] == ours[0]


def test_training_steps_beside_each_other() -> None:
    pytest.importorskip("peft")
    from fastprefix.measure.training.compare_steps import CAT, FROZEN, OURS, PEFT, build_steps, measure_steps
    from fastprefix.measure.training.random_models import random_llama

    model = random_llama(hidden=64, layers=2, heads=4, ffn=96, vocab=50)
    ids = torch.randint(0, 50, (2, 9))
    attention = model.config._attn_implementation
    steps = build_steps(model, ids, 5, (OURS, f"{OURS}:{BACKENDS[0]}", CAT, PEFT, FROZEN))
    assert model.config._attn_implementation == attention
    weights = {p.data_ptr() for p in model.parameters()}
    for name, step in steps.items():
        assert weights <= {p.data_ptr() for p in step.model.parameters()}, name
        before = [x.detach().clone() for x in step.trained]
        step()
        assert all(x.grad is not None and x.grad.abs().max() > 0 for x in step.trained), name
        assert not any(torch.equal(x, y) for x, y in zip(step.trained, before, strict=True)), name
    assert not any(p.grad is not None for p in model.parameters())
    found = measure_steps(steps, repeats=2)
    assert found[OURS].saved_bytes == found[FROZEN].saved_bytes < found[CAT].saved_bytes < found[PEFT].saved_bytes
    assert found[OURS].peak_bytes is None and len(found[OURS].timing.samples) == 2
