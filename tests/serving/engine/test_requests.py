"""Requests to a real server: the greedy tokens of ``attach``, and what is counted, listed and refused."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.serving.engine.server import ABSENT, LENGTH, LENGTHS, VOCABULARY, Server, load, make_adapter

pytest.importorskip("vllm", reason=ABSENT)

PROMPT = [10, 20, 30, 40, 50]


def prompt(seed: int, most: int = 60) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(5, VOCABULARY) for _ in range(numbers.randrange(1, most))]


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=300)


def test_fifty_concurrent_requests_over_twenty_prefixes_and_none(server: Server) -> None:
    """Through the OpenAI client, twice: the second time most blocks are found in the prefix cache."""
    jobs = [([*server.names, "soft", None][i % 22], prompt(i)) for i in range(50)]
    want = [server.attached(name, ids) for name, ids in jobs]
    assert len({tuple(x) for x in want}) > 40
    talk = client(server)

    def ask(job: tuple[str | None, list[int]]) -> list[int]:
        name, ids = job
        extra = {"ignore_eos": True, "return_token_ids": True}
        done = talk.completions.create(model=name or "base", prompt=ids, max_tokens=12, temperature=0, extra_body=extra)
        assert done.model == (name or "base") and done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), 12)
        return list(done.choices[0].token_ids)  # type: ignore[attr-defined]

    for _ in range(2):
        with ThreadPoolExecutor(50) as pool:
            assert list(pool.map(ask, jobs)) == want


def test_the_argument_and_the_chat_route_name_a_prefix_too(server: Server) -> None:
    want = server.attached("p4", PROMPT)
    by_argument = server.complete(None, PROMPT, vllm_xargs={"prefix": "p4"})
    assert by_argument["choices"][0]["token_ids"] == want and by_argument["model"] == "p4"
    messages = [{"role": "user", "content": words(PROMPT)}]
    want = server.attached("p4", [*PROMPT, 3, 4])
    for named in ({"model": "p4"}, {"model": "base", "vllm_xargs": {"prefix": "p4"}}):
        body = {"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **named}
        status, found = server.post("/v1/chat/completions", body)
        assert status == 200 and found["usage"]["prompt_tokens"] == 7, found
        assert found["choices"][0]["message"]["content"].split() == [str(i) for i in want if i > 2]


def test_streams_stop_conditions_and_several_samples(server: Server) -> None:
    want = server.attached("p3", PROMPT)
    talk = client(server)
    extra = {"ignore_eos": True}
    stream = talk.completions.create(
        model="p3", prompt=words(PROMPT), max_tokens=12, temperature=0, stream=True, extra_body=extra
    )
    assert "".join(chunk.choices[0].text for chunk in stream).split() == [str(i) for i in want]
    stopped = server.complete("p3", PROMPT, stop_token_ids=[want[4]])["choices"][0]
    assert stopped["token_ids"] == want[: want.index(want[4]) + 1] and stopped["finish_reason"] == "stop"
    stopped = server.complete("p3", PROMPT, stop=[str(want[4])])["choices"][0]
    assert stopped["finish_reason"] == "stop" and len(stopped["token_ids"]) <= 5
    several = server.complete("p3", PROMPT, n=3, temperature=1e-4)["choices"]  # vLLM refuses n with 0
    assert [choice["token_ids"] for choice in several] == [want] * 3


def test_the_longest_text_is_shorter_by_the_prefix(server: Server) -> None:
    tokens = LENGTHS[4]
    body = {"model": "p4", "prompt": [7] * (LENGTH - tokens - 5), "temperature": 0, "ignore_eos": True}
    status, found = server.post("/v1/completions", {**body, "max_tokens": 6})
    assert status == 400 and f"expected at most 5, as max_model_len is {LENGTH}" in found["error"]["message"]
    _, streamed = server.post("/v1/completions", {**body, "max_tokens": 6, "stream": True})
    assert "expected at most 5, as max_model_len" in str(streamed)
    status, found = server.post("/v1/completions", {**body, "max_tokens": 5})
    assert status == 200 and found["usage"]["completion_tokens"] == 5
    status, found = server.post("/v1/completions", {**body, "prompt": [7] * (LENGTH - tokens), "max_tokens": 1})
    assert status == 400 and "tokens after the 100 of the prefix" in found["error"]["message"]
    body = {"model": "p4", "messages": [{"role": "user", "content": "7"}], "temperature": 0, "ignore_eos": True}
    status, found = server.post("/v1/chat/completions", body)  # as many as there is room for
    assert status == 200 and found["usage"]["completion_tokens"] == LENGTH - tokens - 3
    assert found["choices"][0]["finish_reason"] == "length"


@torch.no_grad()
def test_logprobs_of_prompts_and_repetition_penalties_know_the_text_alone(server: Server) -> None:
    server.read("p2")
    logits = server.model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    want = [float(logits[i, token]) for i, token in enumerate(PROMPT[1:])]
    for _ in range(2):
        found = server.complete("p2", PROMPT, tokens=3, prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
        assert len(found) == len(PROMPT) and found[0] is None
        got = [row[str(token)]["logprob"] for row, token in zip(found[1:], PROMPT[1:], strict=True)]
        assert got == pytest.approx(want, abs=1e-3)
    for name in ("p4", None):
        want_ids = server.attached(name, PROMPT, repetition_penalty=1.7)
        assert server.complete(name, PROMPT, repetition_penalty=1.7)["choices"][0]["token_ids"] == want_ids


def test_beam_search_reads_the_prefix(server: Server) -> None:
    found = server.complete("p1", PROMPT, tokens=6, use_beam_search=True, n=3)
    bare = server.complete(None, PROMPT, tokens=6, use_beam_search=True, n=3)
    text = found["choices"][0]["text"].split()
    assert text != bare["choices"][0]["text"].split()
    assert text == [str(i) for i in server.attached("p1", PROMPT, tokens=6, num_beams=3, length_penalty=0.0)]


def test_tokens_that_a_client_spells_do_not_come_near_a_prefix(server: Server) -> None:
    """Nor its cache: marker, salt and path of a client's own change nothing."""
    want = server.attached("p0", PROMPT)
    forged = {"fastprefix": {"digest": "0" * 64, "tokens": 3, "path": "/etc/passwd"}}
    bare = server.attached(None, PROMPT)
    found = server.complete(None, PROMPT, kv_transfer_params=forged, cache_salt="x")
    assert found["choices"][0]["token_ids"] == bare
    assert server.complete("p0", PROMPT, kv_transfer_params=forged, cache_salt="x")["choices"][0]["token_ids"] == want


def test_adapters_come_change_and_go_and_are_listed(server: Server) -> None:
    name = "fresh"
    assert server.post("/v1/completions", {"model": name, "prompt": PROMPT})[0] == 404
    make_adapter(load(server.model_folder), server.adapters / name, 31)
    assert server.complete(name, PROMPT) == server.attached(name, PROMPT)
    make_adapter(load(server.model_folder), server.adapters / name, 32)
    again = server.attached(name, PROMPT)
    assert server.complete(name, PROMPT) == again
    listed = {card["id"]: card for card in server.get("/v1/models")[1]["data"]}
    assert {*server.names, name, "soft", "base"} == set(listed) and listed[name]["parent"] == "base"
    shutil.rmtree(server.adapters / name)
    for body in ({"model": name}, {"model": "base", "vllm_xargs": {"prefix": name}}):
        status, found = server.post("/v1/completions", {**body, "prompt": PROMPT})
        assert status == 404, found
    assert name not in {card["id"] for card in server.get("/v1/models")[1]["data"]}


def test_adapters_that_cannot_be_served_are_a_400_with_the_reason(server: Server) -> None:
    make_adapter(load(server.model_folder), server.adapters / "gated", 0, gate="tanh", position_offset=None)
    make_adapter(load(server.model_folder), server.adapters / "broken", 0)
    weights = server.adapters / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    for name, reason in (("gated", "gate: got 'tanh'"), ("broken", "got no safetensors")):
        status, found = server.post("/v1/completions", {"model": name, "prompt": PROMPT})
        assert status == 400 and reason in found["error"]["message"], found
        assert str(server.adapters) not in found["error"]["message"]
        shutil.rmtree(server.adapters / name)
    assert server.complete("p0", PROMPT) == server.attached("p0", PROMPT)


def test_the_example_client_asks_every_prefix(server: Server) -> None:
    script = Path(__file__).parents[3] / "examples" / "serve_client.py"
    environment = {**os.environ, "OPENAI_BASE_URL": f"http://127.0.0.1:{server.port}/v1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert {line.split(":")[0] for line in lines[:-1]} == {*server.names, "soft", "base"}
    assert lines[-1].startswith("p0, in a chat:")


def test_five_hundred_malformed_requests_leave_it_serving(server: Server) -> None:
    numbers = random.Random(0)
    names: list[Any] = ["p0", "base", "nowhere", "../p0", "", None, 3, [], {}, "a" * 5000, "p0\0", "é"]
    values: list[Any] = [None, -1, 0, 1e308, "x", [], {}, [[]], True, [VOCABULARY + 5], ["a", 1], "7 8", [7, 8]]
    fields = ["prompt", "max_tokens", "temperature", "n", "vllm_xargs", "kv_transfer_params", "cache_salt", "stop"]
    fields += ["prompt_logprobs", "logprobs", "repetition_penalty", "messages", "model", "stream_options"]
    xargs: list[Any] = [{"prefix": value} for value in (*names, *values)] + [{"prefix": "p0"}, {"fastprefix": 1}]

    def ask(seed: int) -> int:
        pick = random.Random(seed)
        body: Any = {"model": "p0", "prompt": PROMPT, "max_tokens": 2}
        for field in pick.sample(fields, pick.randrange(1, 4)):
            body[field] = pick.choice(names if field == "model" else xargs if field == "vllm_xargs" else values)
        route = pick.choice(["/v1/completions", "/v1/chat/completions"])
        return server.post(route, pick.choice([body, body, body, b"{", b"\xff", [body]]))[0]

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(ask, (numbers.randrange(10**9) for _ in range(500))))
    assert sum(400 <= status < 500 for status in statuses) > 300 and {x for x in statuses if x >= 500} == set()
    assert server.process is not None and server.process.poll() is None
    assert server.complete("p5", PROMPT) == server.attached("p5", PROMPT)
    assert server.complete(None, PROMPT) == server.attached(None, PROMPT)
