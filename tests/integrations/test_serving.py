"""``transformers serve`` with a prefix: it loads models by name, so the prefix is loaded where the server loads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

import fastprefix
from fastprefix import PrefixConfig, init
from fastprefix.serving.continuous_batching import enable_continuous_batching
from tests.support.tiny_models import save_tiny, tiny_model, tiny_tokenizer

PROMPT, TOKENS = "the colour of grass is", 6


class WithPrefix(ModelManager):
    """A server's models, each with the prefix that was saved for it."""

    def __init__(self, adapter: Path, batching: bool = False, **options: Any) -> None:
        self.adapter, self.batching = adapter, batching
        super().__init__(**options)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(*args, **kwargs)
        fastprefix.load(model, self.adapter)
        if self.batching:
            enable_continuous_batching(model)
        return model


def client(manager: ModelManager, continuous: bool = False, state: GenerationState | None = None) -> TestClient:
    state = GenerationState(continuous_batching=continuous) if state is None else state
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    return TestClient(app)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, Path]:
    """A model and, beside it, a prefix of the same model."""
    name, model = str(save_tiny(tmp_path / "base")), tiny_model()
    words = set(tiny_tokenizer().get_vocab().values()) - set(tiny_tokenizer().all_special_ids)
    model.generation_config.suppress_tokens = [i for i in range(model.config.vocab_size) if i not in words]
    model.generation_config.save_pretrained(name)
    fastprefix.attach(model, PrefixConfig(4, init=init.normal(2.0)))
    fastprefix.save(model, tmp_path / "adapter")
    return name, tmp_path / "adapter"


def served(manager: ModelManager, name: str) -> str:
    with client(manager) as server:
        body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0.0}
        answer = server.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def expected(model: Any) -> str:
    tokenizer = tiny_tokenizer()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_completions_read_the_prefix(folders: tuple[str, Path]) -> None:
    name, adapter = folders
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    bare = expected(model)
    fastprefix.load(model, adapter)
    want = expected(model)
    assert want != bare
    assert served(ModelManager(device="cpu", model_timeout=-1), name) == bare
    assert served(WithPrefix(adapter, device="cpu", model_timeout=-1), name) == want


def test_continuous_batching_says_why_not(folders: tuple[str, Path]) -> None:
    name, adapter = folders
    manager = WithPrefix(adapter, device="cpu", model_timeout=-1)
    with client(manager, continuous=True) as server, pytest.raises(ValueError, match="in continuous batching"):
        server.post("/v1/completions", json={"model": name, "prompt": PROMPT, "max_tokens": TOKENS})


def test_continuous_batching_serves_the_prefix(folders: tuple[str, Path]) -> None:
    """Several requests to one engine, completions and streams, once it was enabled."""
    name, adapter = folders
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    fastprefix.load(model, adapter)
    want = expected(model)
    manager = WithPrefix(adapter, batching=True, device="cpu", model_timeout=-1)
    body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0.0}
    state = GenerationState(continuous_batching=True, cb_config=ContinuousBatchingConfig(num_blocks=32))
    with client(manager, state=state) as server:
        answers = [server.post("/v1/completions", json=body) for _ in range(3)]
        streamed = server.post("/v1/completions", json={**body, "stream": True})
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [want] * 3
    lines = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["text"] for line in lines) == want


def test_a_folder_of_adapter_files_is_no_model(folders: tuple[str, Path]) -> None:
    """Nobody serves the bare model believing that it has the prefix."""
    _, adapter = folders
    with client(ModelManager(device="cpu", model_timeout=-1)) as server, pytest.raises((OSError, ValueError)):
        server.post("/v1/completions", json={"model": str(adapter), "prompt": PROMPT})
