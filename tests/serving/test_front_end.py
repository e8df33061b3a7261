"""The front end on stand-ins for vLLM's requests: what the engine gets, what a client sees, and what is refused."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace as Fields
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fastprefix.serving.vllm import limits, plugin, routes
from fastprefix.serving.vllm.front_end import FrontEnd
from fastprefix.serving.vllm.naming import MARKER, UnknownPrefix, use_prefix
from fastprefix.serving.vllm.placeholders import spell
from fastprefix.serving.vllm.worker import Load, Worker
from tests.serving.stand_ins import model_config, params, process_inputs, vllm_config, with_adapters
from tests.support.saved_adapters import P, saved

TEXT = [5, 6, 7, 8]


@pytest.fixture
def front_end(tmp_path: Path) -> FrontEnd:
    for name, seed in (("a", 1), ("b", 2)):
        saved(tmp_path / "adapters" / name, "direct", seed)
    return FrontEnd(with_adapters(tmp_path / "adapters"))


def sent(front_end: FrontEnd, given: Any, text: list[int] = TEXT, name: str = "r", salt: str | None = None) -> Any:
    """A request as the front end's own parts have it, and as the engine gets it."""
    request = front_end.mark(process_inputs)(name, text, given)
    request.cache_salt = salt
    return request, front_end.with_placeholders(request)


def reading(prefix: str, **changed: Any) -> Any:
    return params(extra_args={"prefix": prefix}, **changed)


def test_the_engine_gets_placeholders_and_the_front_end_does_not(front_end: FrontEnd) -> None:
    given = reading("a")
    request, engine = sent(front_end, given)
    entry = front_end.adapters.get("a")
    assert request.prompt_token_ids == TEXT and request.cache_salt is None
    assert engine.prompt_token_ids == spell(entry.digest, P, front_end.letters) + TEXT
    assert engine.sampling_params.extra_args["kv_transfer_params"][MARKER]["path"] == entry.path
    assert given.extra_args == {"prefix": "a"}  # the caller's own object is left as it was


def test_one_prefix_has_one_salt_and_other_prefixes_others(front_end: FrontEnd) -> None:
    salts = [
        sent(front_end, reading(name), salt=salt)[1].cache_salt
        for name, salt in zip("aabaa", (None, None, None, "x", "x"))
    ]
    assert salts[0] == salts[1] and salts[3] == salts[4] and len(set(salts)) == 3
    assert sent(front_end, params())[1].cache_salt is None


def test_a_request_without_a_prefix_stays_as_it_is(front_end: FrontEnd) -> None:
    request, engine = sent(front_end, params())
    assert engine is request and request.prompt_token_ids == TEXT and not front_end.lengths


def test_what_a_client_puts_in_the_place_of_the_marker_is_removed(front_end: FrontEnd) -> None:
    forged = {MARKER: {"digest": "0" * 64, "tokens": 2, "path": "/etc/passwd"}, "other": 1}
    _, engine = sent(front_end, params(extra_args={"kv_transfer_params": forged}))
    assert engine.sampling_params.extra_args["kv_transfer_params"] == {"other": 1}
    assert engine.prompt_token_ids == TEXT
    _, engine = sent(front_end, params(extra_args={"prefix": "a", "kv_transfer_params": forged}))
    marker = engine.sampling_params.extra_args["kv_transfer_params"][MARKER]
    assert marker["path"] == front_end.adapters.get("a").path


def test_a_block_names_the_prefix_of_requests_without_one(front_end: FrontEnd) -> None:
    with use_prefix("a"):
        assert len(sent(front_end, params())[1].prompt_token_ids) == P + len(TEXT)


def test_prompt_logprobs_find_nothing_in_the_cache_and_lose_the_placeholders_rows(front_end: FrontEnd) -> None:
    given = [reading("a", prompt_logprobs=1, skip_reading_prefix_cache=True) for _ in range(2)]
    engines = [sent(front_end, each, name=str(i))[1] for i, each in enumerate(given)]
    assert all(not engine.sampling_params.skip_reading_prefix_cache for engine in engines)
    assert engines[0].cache_salt != engines[1].cache_salt
    assert given[0].skip_reading_prefix_cache
    rows = P + len(TEXT) - 1
    Tensors = namedtuple("Tensors", "logprob_token_ids logprobs selected_token_ranks cu")
    found = Tensors(torch.arange(rows * 2).view(rows, 2), torch.rand(rows, 2), torch.arange(rows), None)
    stats = Fields(
        num_prompt_tokens=P + 4, num_cached_tokens=P + 1, num_external_cached_tokens=1, num_local_cached_tokens=P
    )
    output = Fields(request_id="0", finish_reason=None, new_prompt_logprobs_tensors=found, prefill_stats=stats)
    front_end.without_placeholders([output])
    kept = output.new_prompt_logprobs_tensors
    assert kept.selected_token_ranks.tolist() == list(range(P, rows)) and len(kept.logprobs) == len(TEXT) - 1
    assert vars(stats) == {
        "num_prompt_tokens": 4,
        "num_cached_tokens": 1,
        "num_external_cached_tokens": 0,
        "num_local_cached_tokens": 1,
    }
    assert set(front_end.lengths) == {"0", "1"}
    output.finish_reason, output.new_prompt_logprobs_tensors, output.prefill_stats = "stop", None, None
    front_end.without_placeholders([output])
    assert set(front_end.lengths) == {"1"}


def test_requests_that_were_aborted_are_forgotten(front_end: FrontEnd) -> None:
    front_end.lengths = {str(i): P for i in range(2000)}
    front_end.forget_aborted({"7": None})
    assert front_end.lengths == {"7": P}


def test_the_longest_text_counts_the_prefix(front_end: FrontEnd) -> None:
    room = 64 - P  # max_model_len is 64
    _, engine = sent(front_end, reading("a", max_tokens=room - 4))
    assert engine.sampling_params.max_tokens == room - 4
    _, engine = sent(front_end, reading("a", max_tokens=64 - 4))  # what vLLM gives where a request gives none
    assert engine.sampling_params.max_tokens == room - 4
    with pytest.raises(
        ValueError, match=rf"max_tokens: got {room - 3} after 4 .* expected at most {room - 4}, as max_model"
    ):
        sent(front_end, reading("a", max_tokens=room - 3))
    with pytest.raises(ValueError, match=rf"prompt: got {room} tokens after the {P} of .* expected at most {room - 1}"):
        sent(front_end, reading("a"), text=[5] * room)
    with pytest.raises(ValueError, match="min_tokens: got 60, expected at most"):
        sent(front_end, reading("a", max_tokens=60, min_tokens=60))


def test_requests_that_would_count_placeholders_are_refused(front_end: FrontEnd) -> None:
    with pytest.raises(UnknownPrefix, match="no adapter 'c'"):
        sent(front_end, reading("c"))
    with pytest.raises(ValueError, match="generates nothing"):
        sent(front_end, Fields(extra_args={"prefix": "a"}))
    with pytest.raises(ValueError, match="prompt_logprob_start"):
        sent(front_end, reading("a", prompt_logprob_start=2))
    with pytest.raises(ValueError, match="arrives in parts"):
        front_end.mark(process_inputs)("r", TEXT, reading("a"), resumable=True)
    front_end.second_runner = True
    for name, value in (("repetition_penalty", 1.1), ("prompt_logprobs", 1)):
        with pytest.raises(ValueError, match=f"{name}: got {value}, expected none with a prefix"):
            sent(front_end, reading("a", **{name: value}))


def named(request: Fields, front_end: FrontEnd) -> str | None:
    models = Fields(is_base_model=lambda name: name == "base", lora_requests={"lora": None})
    return routes.name_of(request, models, front_end)


def test_a_prefix_is_named_as_the_model_or_by_an_argument(front_end: FrontEnd) -> None:
    assert named(Fields(model="a", vllm_xargs=None), front_end) == "a"
    assert named(Fields(model="base", vllm_xargs={"prefix": "b"}), front_end) == "b"
    assert named(Fields(model="lora", vllm_xargs={"prefix": "b"}), front_end) == "b"
    assert named(Fields(model="a", vllm_xargs={"prefix": "a"}), front_end) == "a"
    for model in ("base", "lora", "nowhere", None, "", "../adapters/a"):
        assert named(Fields(model=model, vllm_xargs={"other": 1}), front_end) is None
    with pytest.raises(ValueError, match="prefix: got 'b', expected 'a', which the request has as its model"):
        named(Fields(model="a", vllm_xargs={"prefix": "b"}), front_end)
    with pytest.raises(ValueError, match="prefix: got 3, expected a text"):
        named(Fields(model="base", vllm_xargs={"prefix": 3}), front_end)


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "pooling": ({"runner_type": "pooling"}, "no generation"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "an encoder and a decoder"),
    "hybrid": ({"is_hybrid": True}, "layers without attention"),
    "mla": ({"use_mla": True}, "multi-head latent attention"),
    "alibi": ({"uses_alibi": True}, "ALiBi"),
    "window": ({"text": {"sliding_window": 128}}, "a sliding window of 128 tokens"),
    "chunks": ({"text": {"attention_chunk_size": 64}}, "chunked attention of 64 tokens"),
    "shared": ({"text": {"num_kv_shared_layers": 2}}, "layers that share keys and values"),
    "mrope": ({"uses_mrope": True}, "positions in several dimensions"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_refused_by_name_before_anything_is_loaded(kind: str, tmp_path: Path) -> None:
    changed, expected = MODELS[kind]
    with pytest.raises(ValueError, match=f"model: got MODEL, which has {expected}"):
        FrontEnd(with_adapters(tmp_path, model_config=model_config(**changed)))


def test_a_window_that_the_model_does_not_use_is_none(tmp_path: Path) -> None:
    unused = model_config(text={"sliding_window": 128, "use_sliding_window": False})
    assert not limits.reasons(with_adapters(tmp_path, model_config=unused))


def test_options_that_have_no_prefix_are_refused(tmp_path: Path) -> None:
    for changed, expected in (
        ({"speculative_config": Fields(method="eagle")}, "speculative decoding by 'eagle'"),
        ({"parallel_config": Fields(decode_context_parallel_size=2)}, "decode_context_parallel_size 2"),
    ):
        with pytest.raises(ValueError, match=expected):
            FrontEnd(with_adapters(tmp_path, **changed))
    assert not limits.reasons(with_adapters(tmp_path, speculative_config=Fields(method="ngram")))
    config = with_adapters(tmp_path)
    config.kv_transfer_config.kv_load_failure_policy = "recompute"
    with pytest.raises(ValueError, match="kv_load_failure_policy 'recompute'"):
        FrontEnd(config)
    with pytest.raises(ValueError, match="adapters: got None, expected a folder"):
        FrontEnd(vllm_config())


def test_versions(caplog: pytest.LogCaptureFixture) -> None:
    plugin.check_version(plugin.TESTED[0])
    plugin.check_version(plugin.TESTED[0] + "+cpu")
    assert not caplog.messages
    plugin.check_version("0.99.1")
    assert "was tested with vLLM 0.32.0, and this is 0.99.1" in caplog.text
    with pytest.raises(ValueError, match=r"vllm: got version 0.9.2, expected 0.32 or later"):
        plugin.check_version("0.9.2")


def test_a_worker_writes_what_is_missing_where_the_blocks_are(front_end: FrontEnd) -> None:
    entry = front_end.adapters.get("a")
    written: list[Any] = []
    impl = Fields(do_kv_cache_update=lambda layer, k, v, cache, slots: written.append((k, v, slots.tolist())))
    layers = {1: Fields(impl=impl, kv_cache=torch.zeros(1))}
    worker = Worker(0, 1, 2, block_size=2, most_resident=1)
    worker.load([Load(entry.path, 1, P, (9, 4, 7))], layers)
    ((k, v, slots),) = written
    whole = worker.resident.get(entry.path, layers, slice(None))[1]
    assert slots == [9 * 2 + 1, 4 * 2] and torch.equal(k, whole[0][1:]) and torch.equal(v, whole[1][1:])
    worker.load([Load("/nowhere.safetensors", 2, P, (9, 4, 7))], layers)
    assert worker.take_failed() == {4} and not worker.take_failed()  # block 9 holds good tokens, for others too
