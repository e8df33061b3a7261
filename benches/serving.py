"""Prefixes in vLLM on this machine: are its answers those of ``attach``, how much memory do many take, how fast is it?

    build/serve-venv/bin/python -m benches.serving             # after make test-serve, which makes the environment

SmolLM2-135M in fp32 without compilation. Three parts, each of which prints a line: 50 concurrent requests over 20
prefixes and the bare model; the same prompts by vLLM with prefixes, by vLLM with each prefix's text in the prompt, and
by ``generate`` with ``prefix_batch``; and 1,000 registered adapters, each asked once.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

import fastprefix
from fastprefix.assets.smollm2 import load_smollm2, smollm2_dir
from fastprefix.hf.storage.peft_format import pack
from fastprefix.hf.storage.validated_files import write_json, write_tensors
from tests.serving.engine.server import Server

WORDS = [
    "lighthouse",
    "river",
    "market",
    "engine",
    "winter",
    "garden",
    "violin",
    "harbour",
    "letter",
    "mountain",
    "copper",
    "island",
]
Job = tuple[str | None, list[int]]


class SmolLM2(Server):
    """The tests' server with SmolLM2 and prefixes that stand for texts."""

    def __init__(self, folder: Path, prefixes: int, tokens: int) -> None:
        self.folder, self.adapters = folder, folder / "adapters"
        self.model_folder, self.log, self.process = smollm2_dir(), folder / "log", None
        self.model, self.tokenizer = load_smollm2()
        self.model.generation_config.eos_token_id = None  # as requests with ignore_eos
        self.loaded = set()
        self.texts = {f"p{i}": self.text(i, tokens) for i in range(prefixes)}
        for name, ids in self.texts.items():
            with torch.no_grad():
                cache = self.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
            keys, values = ([getattr(layer, part)[0] for layer in cache.layers] for part in ("keys", "values"))
            self.write(name, pack(keys, values))

    def write(self, name: str, embeddings: torch.Tensor) -> None:
        """An adapter as PEFT saves one, ``[P, 2*L*H_kv*D]``."""
        folder, tokens = self.adapters / name, len(embeddings)
        folder.mkdir(parents=True)
        write_tensors({"prompt_embeddings": embeddings}, str(folder / "adapter_model.safetensors"))
        write_json({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens}, str(folder / "adapter_config.json"))

    def text(self, seed: int, tokens: int) -> list[int]:
        """Some tokens of a text of sentences."""
        pick = random.Random(seed)
        sentences = (f"The {pick.choice(WORDS)} was near the {pick.choice(WORDS)}." for _ in range(tokens))
        return list(self.tokenizer(" ".join(sentences))["input_ids"][:tokens])

    def many(self, number: int) -> list[str]:
        """More adapters, with numbers of their own."""
        config = self.model.config
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        names = [f"many{i}" for i in range(number)]
        for i, name in enumerate(names):
            self.write(name, torch.randn(16, size, generator=torch.Generator().manual_seed(i)) * 0.1)
        return names

    def resident(self) -> float:
        """MiB of memory of the server and all of its processes."""
        assert self.process is not None
        whole = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(process.memory_full_info().uss for process in whole) / 2**20

    def at_once(self, jobs: list[Job], tokens: int, clients: int) -> tuple[list[list[int]], float]:
        """Completions by so many concurrent clients, and the seconds that all of them took."""
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(lambda job: self.complete(*job, tokens), jobs))
        return found, time.perf_counter() - start


@torch.no_grad()
def prefix_batch(served: SmolLM2, jobs: list[Job], tokens: int, rows: int) -> tuple[list[list[int]], float]:
    """The same by transformers, so many rows at a time; all prompts have one length."""
    keys = {None: None, **{name: served.read(name) for name in served.texts}}
    found: list[list[int]] = []
    start = time.perf_counter()
    for i in range(0, len(jobs), rows):
        part = jobs[i : i + rows]
        ids = torch.tensor([prompt for _, prompt in part])
        with fastprefix.prefix_batch(served.model, [keys[name] for name, _ in part]):
            done = served.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        found += done[:, ids.shape[1] :].tolist()
    return found, time.perf_counter() - start


def correctness(served: SmolLM2) -> None:
    names: list[str | None] = [*served.texts, None]
    jobs = [(names[i % 21], served.text(1000 + i, 3 + i % 40)) for i in range(50)]
    got, _ = served.at_once(jobs, 16, 50)
    want = [served.attached(*job, 16) for job in jobs]
    equal = sum(a == b for a, b in zip(got, want, strict=True))
    print(f"50 concurrent requests, 20 prefixes and the bare model: {equal} have attach's greedy tokens", flush=True)


def memory(served: SmolLM2, number: int) -> None:
    names = served.many(number)
    prompt = served.text(0, 8)
    jobs: list[Job] = [(name, prompt) for name in names]
    before = served.resident()
    line = [f"{before:.0f} MiB before"]
    for part in range(0, number, number // 4):
        served.at_once(jobs[part : part + number // 4], 2, 16)
        line.append(f"{served.resident():.0f} after {part + number // 4}")
    size = sum(file.stat().st_size for name in names for file in (served.adapters / name).iterdir()) / 2**20
    print(f"{number} adapters, {size:.0f} MiB on disk, each asked once: {', '.join(line)}", flush=True)


def throughput(served: SmolLM2, number: int, tokens: int, repeats: int) -> None:
    names = list(served.texts)
    jobs: list[Job] = [(names[i % len(names)], served.text(5000 + i, 16)) for i in range(number)]
    best: dict[str, float] = {}
    answers: dict[str, Any] = {}
    for repeat in range(repeats):  # other prompts' words each time, or the cache would hold whole prompts
        shift = [(name, [*ids[repeat + 1 :], *ids[: repeat + 1]]) for name, ids in jobs]
        texts: list[Job] = [(None, served.texts[str(name)] + ids) for name, ids in shift]
        for what, run in (
            ("vLLM with prefixes", lambda: served.at_once(shift, tokens, 20)),  # noqa: B023
            ("vLLM with texts", lambda: served.at_once(texts, tokens, 20)),  # noqa: B023
            ("generate with prefix_batch", lambda: prefix_batch(served, shift, tokens, 20)),  # noqa: B023
        ):
            answers[what], seconds = run()
            best[what] = min(best.get(what, seconds), seconds)
    equal = sum(
        a == b for a, b in zip(answers["vLLM with prefixes"], answers["generate with prefix_batch"], strict=True)
    )
    rates = ", ".join(f"{what} {number * tokens / seconds:.0f}" for what, seconds in best.items())
    print(f"tokens generated a second, best of {repeats}: {rates}; {equal} of {number} rows equal", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of each prefix")
    parser.add_argument("--many", type=int, default=1000, help="adapters for the memory")
    parser.add_argument("--requests", type=int, default=40, help="of the throughput")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("FASTPREFIX_VERIFY", "off")
    with tempfile.TemporaryDirectory() as scratch:
        served = SmolLM2(Path(scratch), 20, options.tokens)
        served.start()
        try:
            correctness(served)
            throughput(served, options.requests, 32, options.repeats)
            memory(served, options.many)
        finally:
            served.stop()


if __name__ == "__main__":
    main()
