"""The command line from end to end, on a tiny model in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastprefix
from fastprefix import cli
from tests.support.cli_runs import make_folder, train
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers")

COMMANDS = ("demo", "train", "generate", "inspect", "bench", "memory", "explain")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 10).view(1, -1)).logits


def losses(out: str) -> tuple[float, float]:
    lines = [line for line in out.splitlines() if line.startswith("held-out loss")]
    before, after = (float(line.rsplit(" ", 1)[1]) for line in lines)
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--num-virtual-tokens", "4", "--lr", "0.05"],
        ["--prefix-projection", "--init-text", "the colour of grass is green", "--num-virtual-tokens", "6"],
        ["--gradient-checkpointing", "--save-steps", "5", "--init", "random"],
        ["--bf16", "--init", "random"],
    ],
    ids=["direct", "projected", "checkpointing", "bf16"],
)
def test_training_lowers_the_loss_and_both_libraries_load_it(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "--epochs", "5", "--eval-data", str(folder / "data.jsonl"), *options) == 0
    before, after = losses(capsys.readouterr().out)
    assert after < before - 0.5
    ours, bare = tiny_model(), tiny_model()
    prefix = fastprefix.load(ours, folder / "out")
    assert all(p.dtype == torch.float32 for p in prefix.parameters())
    assert (logits(ours) - logits(bare)).abs().max() > 0.01
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(bare, folder / "out")), logits(ours), rtol=0, atol=1e-5
    )


def test_resuming_on_the_command_line_is_exact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--epochs", "2", "--save-steps", "3")
    assert train(folder, *options, output="whole") == 0
    (folder / "part").mkdir()
    (folder / "whole" / "checkpoint-3").rename(folder / "part" / "checkpoint-3")
    assert train(folder, *options, "--resume", output="part") == 0
    name = "adapter_model.safetensors"
    assert (folder / "part" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    capsys.readouterr()
    assert train(folder, *options, output="part") == cli.USER_ERROR
    assert "--resume" in capsys.readouterr().err


def test_the_seed_decides(folder: Path) -> None:
    for output, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(folder, "--max-steps", "2", "--seed", seed, output=output) == 0
    a, b, c = ((folder / output / "adapter_model.safetensors").read_bytes() for output in "abc")
    assert a == b != c


def test_explain_shows_the_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", str(folder / "model"), "--num-virtual-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "P=5" in out and "model.layers.1.self_attn" in out
    train(folder, "--max-steps", "1", "--num-virtual-tokens", "3")
    capsys.readouterr()
    assert cli.main(["explain", "--model", str(folder / "model"), "--adapter", str(folder / "out")]) == 0
    assert "P=3" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_and_bench_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--model", str(folder / "model"), "--batch", "2", "--seq", "8", "--prefix", "4"]) == 0
    assert "MiB" in capsys.readouterr().out
    assert cli.main(["bench", "--shape", "1,2,1,8,4,16", "--repeats", "1"]) == 0
    assert "ours" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_subcommand(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"fastprefix {command}" in capsys.readouterr().out


def test_help_names_every_subcommand_and_imports_no_more_than_torch() -> None:
    code = (
        "import sys; from fastprefix.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('transformers', 'peft', 'matplotlib', 'torch._dynamo') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"    {command} " in out for command in COMMANDS)
    assert out.endswith("[]\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "./nowhere"], "--model: no folder ./nowhere"),
        (["--resume"], "--resume: no checkpoint"),
        (["--max-length", "2"], "data.jsonl, line 1: its prompt of"),
    ],
    ids=["data", "model", "resume", "length"],
)
def test_a_users_error_is_one_line(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = train(folder, "--max-steps", "1", *options)
    error = capsys.readouterr().err
    assert status == cli.USER_ERROR
    assert error.startswith("fastprefix train: ") and message in error and error.count("\n") == 1


def test_a_bad_line_is_named_with_its_field(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert train(folder) == cli.USER_ERROR
    assert "data.jsonl, line 2: the field 'completion' is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="line 2"):
        train(folder, "--traceback")


def test_bad_numbers_and_unknown_commands_stop_before_anything_loads(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["demo", "--steps", "0"], ["frobnicate"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == cli.USER_ERROR
    assert "expected at least 1" in capsys.readouterr().err


def test_ctrl_c_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastprefix.hf.trainer.PrefixTrainer.train", interrupt)
    assert train(folder) == cli.INTERRUPTED
    assert capsys.readouterr().err.endswith("fastprefix train: interrupted\n")


@pytest.mark.slow
def test_the_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "demo")]) == 0
    found = json.loads((tmp_path / "demo" / "demo.json").read_text())
    heldout = found["heldout_loss"]
    assert heldout["trained"] < heldout["untrained"] < heldout["without"]
    assert found["peft_max_logit_difference"] < 1e-3
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    page = (tmp_path / "demo" / "inspect.html").read_text()
    assert page.count('<line class="move"') == 12 and all(x["word"] in page for x in found["generations"])
    assert f"{heldout['trained']:.3f}" in capsys.readouterr().out
