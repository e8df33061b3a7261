"""vLLM's ``LLM`` in Python: a cache that is too small, prompts in pieces, drafts from the text, and two workers."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from fastprefix.serving.vllm import use_prefix
from tests.serving.engine.server import ABSENT, LENGTH, VOCABULARY, Server

pytest.importorskip("vllm", reason=ABSENT)
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.exceptions import VLLMNotFoundError
from vllm.sampling_params import BeamSearchParams

TOKENS = 24


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Model and adapters, without a server."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    folder = tmp_path_factory.mktemp("offline")
    os.environ["FASTPREFIX_CACHE"] = str(folder / "cache")
    return Server(folder, adapters=8)


def engine(served: Server, **options: Any) -> LLM:
    extra = {"adapters": str(served.adapters), "max_resident": 2}
    transfer = KVTransferConfig(kv_connector="FastprefixConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    given = {"dtype": "float32", "max_model_len": LENGTH, "enforce_eager": True, "block_size": 32, **options}
    return LLM(str(served.model_folder), kv_transfer_config=transfer, disable_log_stats=False, **given)


def jobs(served: Server) -> list[tuple[str | None, list[int]]]:
    """Prompts whose words come again, so that drafts from the text are found."""
    numbers = random.Random(0)
    found: list[tuple[str | None, list[int]]] = []
    for i in range(27):
        part = [numbers.randrange(5, VOCABULARY) for _ in range(numbers.randrange(3, 30))]
        found.append(([*served.names, None][i % 9], part * 2))
    return found


def generated(llm: LLM, asked: list[tuple[str | None, list[int]]]) -> list[list[int]]:
    params = [
        SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=None if name is None else {"prefix": name}
        )
        for name, _ in asked
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for _, ids in asked], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [ids for _, ids in asked]
    return [list(output.outputs[0].token_ids) for output in outputs]


def count(llm: LLM, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)  # type: ignore[union-attr]


def test_preemption_chunks_and_drafts(served: Server) -> None:
    """Requests lose their blocks, begin again, and read their prefix again; what they say stays the same."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    options = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 48, "max_num_seqs": 12}
    llm = engine(served, speculative_config=ngram, **options)
    asked = jobs(served)
    want = [served.attached(name, ids, TOKENS) for name, ids in asked]
    for _ in range(2):
        assert generated(llm, asked) == want
    assert count(llm, "vllm:num_preemptions") > 0
    assert count(llm, "vllm:spec_decode_num_drafts") > 0
    with use_prefix("p1"):
        beams = llm.beam_search(
            [{"prompt_token_ids": asked[0][1]}], BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
        )
    best = beams[0].sequences[0].tokens[len(asked[0][1]) :]
    assert best == served.attached("p1", asked[0][1], 5, num_beams=3)
    with pytest.raises(VLLMNotFoundError, match="no adapter 'nowhere'"):
        generated(llm, [("nowhere", [5, 6])])
    assert generated(llm, asked[:3]) == want[:3]


def test_a_file_that_is_gone_fails_its_requests_and_no_others(served: Server) -> None:
    """The engine lives, and the prefix's blocks are not taken for good ones afterwards."""
    llm = engine(served)
    asked = jobs(served)[:9]
    want = [served.attached(name, ids, TOKENS) for name, ids in asked]
    front_end = llm.llm_engine.fastprefix_front_end  # type: ignore[attr-defined]
    path = Path(front_end.adapters.get("p2").path)
    kept = path.read_bytes()
    path.unlink()
    good = [job for job in asked if job[0] != "p2"]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args={"prefix": "p2"})
    outputs = llm.generate([{"prompt_token_ids": [7, 8, 9]}], params, use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error" and not outputs[0].outputs[0].token_ids
    assert generated(llm, good) == [x for job, x in zip(asked, want, strict=True) if job[0] != "p2"]
    path.write_bytes(kept)
    assert generated(llm, asked) == want


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers want two processors")
def test_two_workers_hold_the_heads_of_one(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])))
    asked = jobs(served)
    llm = engine(served, tensor_parallel_size=2)
    assert generated(llm, asked) == [served.attached(name, ids, TOKENS) for name, ids in asked]
