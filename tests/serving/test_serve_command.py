"""``fastprefix serve``: the command line that it becomes, and what it refuses before vLLM is looked for."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from fastprefix import cli


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["serve", "--dry-run", *words]) == 0
    return shlex.split(capsys.readouterr().out)


def test_the_command_line_of_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--adapters", str(tmp_path), "--max-resident", "5", "--port", "9000"]
    words = printed(capsys, "--model", "meta-llama/Llama-3.2-1B", *given, "--", "--max-model-len", "4096")
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and words[-2:] == ["--max-model-len", "4096"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    transfer = json.loads(options.pop("--kv-transfer-config"))
    assert options == {
        "--model": "meta-llama/Llama-3.2-1B",
        "--served-model-name": "meta-llama/Llama-3.2-1B",
        "--host": "127.0.0.1",
        "--port": "9000",
        "--max-model-len": "4096",
    }
    assert transfer["kv_connector"] == "FastprefixConnector" and transfer["kv_role"] == "kv_both"
    assert transfer["kv_connector_extra_config"] == {"adapters": str(tmp_path), "max_resident": 5}


def test_a_name_of_the_users_own_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = printed(capsys, "--model", "m", "--adapters", str(tmp_path), "--", "--served-model-name", "mine")
    assert words.count("--served-model-name") == 1


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for model, folder, expected in (
        ("m", tmp_path / "nowhere", "--adapters: no folder"),
        (str(tmp_path / "empty"), tmp_path, "has no config.json"),
    ):
        assert cli.main(["serve", "--model", model, "--adapters", str(folder)]) == cli.USER_ERROR
        assert expected in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed: the server would start")
def test_without_vllm_the_command_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", "m", "--adapters", str(tmp_path)]) == cli.USER_ERROR
    assert "vLLM is not installed: pip install" in capsys.readouterr().err
