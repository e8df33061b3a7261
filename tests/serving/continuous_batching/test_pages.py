"""Pages of prefixes: shared, told apart, evicted, written again, forked and moved out of a full cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import offloading_manager
from transformers.generation.continuous_batching.requests import RequestState

import fastprefix
from fastprefix import PrefixConfig, init
from fastprefix.serving.continuous_batching.paged_prefix import PagedPrefix, count_placeholders, placeholders
from tests.serving.continuous_batching.engines import PAGE, alone, engine, prompts, tokens_of, with_prefixes

LONG = 24


def test_whole_pages_are_written_once_and_the_rest_for_each_request() -> None:
    model = with_prefixes()
    with engine(model) as manager:
        manager.generate([[5, 6], [7, 8], [9]], ["p40"] * 3)
        assert manager.pages.written == 32 + 3 * 8  # 40 tokens are two pages of 16 and 8 tokens
        manager.generate([[5, 6], [7, 8]], ["p16"] * 2)
        assert manager.pages.written == 56 + 16
        manager.generate([[5, 6]] * 2, ["p3"] * 2)
        assert manager.pages.written == 72 + 2 * 3
        manager.generate([[5, 6]], [None])
        assert manager.pages.written == 78


def test_the_text_after_a_prefix_is_shared_by_its_own_requests_alone() -> None:
    """The same long text after two prefixes of one length, and after none."""
    model = with_prefixes()
    torch.manual_seed(11)
    fastprefix.attach(model, PrefixConfig(21, init=init.normal(0.8)), "twin")
    fastprefix.set_prefix(model, None)
    text = prompts(1, seed=4)[0] * 3 + list(range(3, 30))
    names = ["p21", "twin", None, "twin", "p21", None]
    want = [alone(model, text, name) for name in names]
    assert want[0] != want[1] != want[2] != want[0]
    with engine(model) as manager:
        for name, tokens in zip(names, want, strict=True):  # one after the other: the text's pages are in the cache
            assert tokens_of(manager.generate([text], [name])) == [tokens]
        assert tokens_of(manager.generate([text] * 6, names)) == want


def test_prefixes_of_the_same_numbers_share_pages() -> None:
    model = with_prefixes()
    prefix = fastprefix.attach(model, PrefixConfig(32, init=init.normal(0.8)), "first")
    fastprefix.attach(model, PrefixConfig(init=init.slice(prefix)), "second")
    fastprefix.set_prefix(model, None)
    with engine(model) as manager:
        found = tokens_of(manager.generate([[5, 6], [5, 6]], ["first", "second"]))
        assert manager.pages.written == 32
    assert found[0] == found[1] == alone(model, [5, 6], "second")


def counted_restarts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    original = RequestState.create_equivalent_initial_request

    def restart(self: Any) -> Any:
        found.append(self.request_id)
        return original(self)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", restart)
    return found


NAMES = ["p21", None, "p40", "prompt"]


def full_cache(blocks: int, **options: Any) -> Any:
    """Requests that do not fit together: their tokens, what was wanted, and the pages."""
    model = with_prefixes()
    texts = prompts(12)
    names = [NAMES[i % 4] for i in range(12)]
    want = [alone(model, ids, name, LONG) for ids, name in zip(texts, names, strict=True)]
    with engine(model, LONG, blocks, **options) as manager:
        first = tokens_of(manager.generate(texts, names))
        return first, tokens_of(manager.generate(texts, names)), want, manager.pages


@pytest.mark.parametrize(("blocks", "resident"), [(7, 32), (9, 1), (14, 32), (22, 1)])
def test_a_full_cache_starts_requests_anew(blocks: int, resident: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose prefix nothing but the request keeps in memory."""
    restarts = counted_restarts(monkeypatch)
    first, second, want, pages = full_cache(blocks, resident=resident)
    assert first == second == want
    assert restarts or blocks > 14
    assert pages.written > 200  # evicted pages were written again


def test_requests_that_are_moved_to_the_processor_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine wants pinned memory for them, which a machine without an accelerator does not have."""
    restarts, moved, empty = counted_restarts(monkeypatch), [], torch.empty
    move = offloading_manager.OffloadingManager._offload_to_cpu

    def note(self: Any, *args: Any) -> Any:
        found = move(self, *args)
        moved.extend(found)
        return found

    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr(offloading_manager.OffloadingManager, "_offload_to_cpu", note)
    first, second, want, _ = full_cache(9, cpu_offload_space=0.01, cpu_offload_space_safety_threshold=1.0)
    assert first == second == want
    assert moved and not restarts


@pytest.mark.parametrize("blocks", [60, 9])
def test_forked_sequences(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that find no room start by themselves."""
    from transformers import GenerationConfig

    restarts = counted_restarts(monkeypatch)
    model = with_prefixes()
    options: dict[str, Any] = {"max_new_tokens": LONG, "eos_token_id": 2}
    generation = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=3, **options)
    texts = [[5], *prompts(3)]
    want = [alone(model, ids, name, LONG) for ids, name in zip(texts, NAMES, strict=True) for _ in range(3)]
    with engine(model, LONG, blocks, generation) as manager:
        assert tokens_of(manager.generate(texts, NAMES)) == want
    assert bool(restarts) == (blocks == 9)


def test_cancelled_requests_leave_the_others_right() -> None:
    model = with_prefixes()
    texts = prompts(8)
    want = [alone(model, ids, "p21") for ids in texts]
    with engine(model, blocks=9) as manager:
        for ids in prompts(8, seed=1):
            manager.cancel_request(manager.add_request(ids, prefix="p40", max_new_tokens=60))
        assert tokens_of(manager.generate(texts, ["p21"] * 8)) == want


def test_streamed_results_have_the_prompt_that_was_asked_for() -> None:
    model = with_prefixes()
    with engine(model) as manager:
        manager.add_request([5, 6, 7], prefix="p21", streaming=True)
        results = []
        while not results or not results[-1].is_finished():
            results += [x for x in [manager.get_result(timeout=5)] if x is not None]
    assert len(results) > 1 and all(x.prompt_ids == [5, 6, 7] for x in results)
    assert results[-1].generated_tokens == alone(model, [5, 6, 7], "p21")


def test_placeholders_are_negative_and_depend_on_every_number() -> None:
    keys, values = [torch.randn(40, 2, 8)], [torch.randn(40, 2, 8)]
    ids = PagedPrefix(keys, values).ids
    assert len(ids) == len(set(ids)) == 40 and all(-(2**31) <= token < 0 for token in ids)
    assert ids == PagedPrefix([keys[0].clone()], [values[0].clone()]).ids
    values[0][39, 1, 7] += 1e-6
    changed = PagedPrefix(keys, values).ids
    assert not set(ids) & set(changed)
    assert not set(ids) & set(PagedPrefix(values, keys).ids)
    assert placeholders(b"x" * 32, 5) == placeholders(b"x" * 32, 9)[:5]
    assert count_placeholders([*ids, 4, 5]) == 40 and count_placeholders([4]) == 0
    half = PagedPrefix([x.bfloat16() for x in keys], [x.bfloat16() for x in values]).ids
    assert len(half) == 40 and PAGE < 40
