"""A server of a small random model in a process of its own, and what ``attach`` generates with the same adapters."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

import fastprefix
from fastprefix import PrefixConfig, PromptConfig, init

# The reason why tests are skipped by make test, whose venv cannot have vLLM's versions of everything.
ABSENT = "vLLM is not installed here: make test-serve runs these tests in a venv of its own"
VOCABULARY, LENGTH = 512, 256
LENGTHS = (16, 21, 40, 64, 100, 7, 33)
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH)]
SECONDS = 420  # until the server answers, on a machine with other work


def model_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
    )


def make_model(folder: Path) -> Path:
    """The model, and a tokenizer of numbers: token 7 is the word 7, and the first three are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(model_config()).eval().save_pretrained(folder)
    vocabulary = {name: i for i, name in enumerate(("<unk>", "<bos>", "<eos>", *map(str, range(3, VOCABULARY))))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} 3 {% endfor %}{% if add_generation_prompt %}4{% endif %}"
    words = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    words.chat_template = template
    words.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    found = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found.generation_config.eos_token_id = None  # as requests with ignore_eos
    return found


def make_adapter(model: Any, folder: Path, number: int, **changed: Any) -> None:
    """An adapter of numbers that change what the model says."""
    torch.manual_seed(100 + number)
    offset = "none" if number % 4 == 3 else "after_prefix"
    options = {"position_offset": offset, "init": init.normal(1.0), **changed}
    fastprefix.attach(model, PrefixConfig(LENGTHS[number % len(LENGTHS)], **options))
    fastprefix.save(model, folder)
    fastprefix.detach(model)


class Server:
    """A model, a folder of adapters, and the process that serves them."""

    def __init__(self, folder: Path, adapters: int = 20) -> None:
        self.folder, self.adapters = folder, folder / "adapters"
        self.model_folder = make_model(folder / "model")
        self.model = load(self.model_folder)
        self.names = [f"p{i}" for i in range(adapters)]
        scratch = load(self.model_folder)  # detach takes all adapters of a model away
        for i, name in enumerate(self.names):
            make_adapter(scratch, self.adapters / name, i)
        torch.manual_seed(9)
        fastprefix.attach(scratch, PromptConfig(9, init=init.normal(1.0)))
        fastprefix.save(scratch, self.adapters / "soft")
        self.loaded: set[str] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "log"

    def start(self, *options: str) -> None:
        """Start the server and wait until it answers."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        words = ["--model", str(self.model_folder), "--adapters", str(self.adapters), "--max-resident", "4"]
        own = ["--port", str(self.port), "--", *OPTIONS, "--served-model-name", "base", *options]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "FASTPREFIX_CACHE": str(self.folder / "cache")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastprefix.cli", "serve", *words, *own],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-4000:])

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End the server and all of its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, how)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(60)
            self.process = None

    def get(self, path: str) -> tuple[int, Any]:
        """Status and body of a request."""
        return self._ask(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and body of a request with a body, JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        return self._ask(urllib.request.Request(url, data, {"Content-Type": "application/json"}))

    @staticmethod
    def _ask(request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=300) as found:
                status, text = found.status, found.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode(errors="replace")

    def complete(self, name: str | None, prompt: list[int], tokens: int = 12, **options: Any) -> Any:
        """The token ids of a greedy completion, or the whole answer where options are given."""
        body = {"model": name or "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        status, found = self.post("/v1/completions", {**body, "return_token_ids": True, **options})
        assert status == 200, found
        return found if options else found["choices"][0]["token_ids"]

    @torch.no_grad()
    def attached(self, name: str | None, prompt: list[int], tokens: int = 12, **options: Any) -> list[int]:
        """What transformers generates with the adapter attached by this library."""
        ids = torch.tensor([prompt])
        self.read(name)
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return list(found[0, len(prompt) :].tolist())

    def read(self, name: str | None) -> str | None:
        """Let transformers' model read the adapter as its files are now; the name under which the model has it."""
        if name is not None:
            stamp = (self.adapters / name / "adapter_model.safetensors").stat().st_mtime_ns
            if (key := f"{name}_{stamp}") not in self.loaded:
                fastprefix.load(self.model, self.adapters / name, key)
                self.loaded.add(key)
            fastprefix.set_prefix(self.model, key)
            return key
        if self.loaded:
            fastprefix.set_prefix(self.model, None)
        return None
