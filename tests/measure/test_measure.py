"""Measuring itself: exact bytes, known floors, peers that agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fastprefix.measure import (
    Candidate,
    Cost,
    Leaves,
    Mode,
    Peaks,
    Problem,
    SavedBytes,
    Timing,
    cost,
    interleaved,
    measure,
    ratio,
    saved_bytes,
)
from fastprefix.measure.operator import candidates as candidates_module
from fastprefix.measure.operator.correctness import broken_rule, disagreement, results
from fastprefix.measure.operator.problem import TRAINED
from fastprefix.measure.operator.runner import runner

TRAIN = Problem.train(2, 6, 2, 33, 7, 16)
BIDIRECTIONAL = Problem(B=2, H=4, H_kv=4, S=9, T=14, P=5, D=16, causal=False)
CACHED = Problem(B=2, H=4, H_kv=2, S=4, T=14, P=5, D=16)
DECODE = Problem.decode(3, 6, 2, 9, 17, 16)
CASES: tuple[tuple[Problem, Mode], ...] = (
    (TRAIN, "forward"),
    (TRAIN, "backward"),
    (BIDIRECTIONAL, "backward"),
    (CACHED, "backward"),
    (TRAIN.without_prefix(), "backward"),
    (TRAIN, "lowest"),
    (DECODE, "decode"),
)


@pytest.mark.parametrize(("problem", "mode"), CASES)
def test_peers_agree_with_the_reference(problem: Problem, mode: Mode) -> None:
    leaves, trained = Leaves.of(problem, mode), [f"d{name}" for name in TRAINED[mode]]
    want = results(Leaves.random(problem, requires_grad=True), causal=problem.causal, backend="reference")
    ran = []
    for peer in candidates_module.candidates_for(problem, mode):
        if peer.exact and peer.name != "flex" and not peer.unavailable(problem, mode):
            got = runner(peer, problem, mode, leaves)()
            assert list(got) == ["o", *trained]
            assert disagreement(got, want, problem.dtype) is None, peer.name
            ran.append(peer.name)
    others = [name for name in ran if not name.startswith("ours")]
    assert ran[0] == "ours"
    assert others == (["cache_sdpa", "cache_packed"] if mode == "decode" else ["cat_mask", "cat_sdpa"])


@pytest.mark.slow
def test_flex_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ours", "cat_mask", "flex")
    found = measure(TRAIN, "forward", repeats=1, only=names)
    told = found.failures.get("flex", "")
    if "wrong" in told:
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        found = measure(TRAIN, "forward", repeats=1, only=names)
    assert set(found.timings) == set(names), found.failures
    if told:
        pytest.skip(f"compiled for this CPU, FlexAttention is not what it is uncompiled: {told}")


def test_the_floor_peer_is_plain_attention() -> None:
    leaves = Leaves.random(CACHED)
    floor = next(p for p in candidates_module.candidates_for(CACHED, "forward") if not p.exact)
    want = results(Leaves.random(CACHED.without_prefix()), causal=True, backend="reference")
    assert disagreement(runner(floor, CACHED, "forward", leaves)(), want, torch.float32) is None


def _add_peer(monkeypatch: pytest.MonkeyPatch, name: str, prepare: Callable[..., Callable[[], Tensor]]) -> None:
    more = Candidate(name, "", prepare, lambda problem, mode: None)
    monkeypatch.setattr(candidates_module, "TRAIN_BASELINES", (*candidates_module.TRAIN_BASELINES, more))


def test_nothing_is_trained_below_the_lowest_layer() -> None:
    """Without a prefix there is no backward at all, and what plain attention takes is a forward."""
    bare = TRAIN.without_prefix()
    assert cost(bare, "lowest") == cost(bare, "forward")
    floor = next(p for p in candidates_module.candidates_for(TRAIN, "lowest") if not p.exact)
    assert list(runner(floor, TRAIN, "lowest")()) == ["o"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the device")
def test_the_interpreter_is_not_timed() -> None:
    found = measure(TRAIN, "forward", repeats=1)
    reasons = {name: reason for name, reason in found.failures.items() if name.startswith("ours")}
    assert set(reasons.values()) <= {"interpreted: not timed"} and "ours" in found.timings


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's own causal flag aligns at the top left: the classic mistake with a prefix in front."""

    def top_left(problem: Problem, x: Leaves) -> Callable[[], Tensor]:
        return lambda: scaled_dot_product_attention(x.q, *x.concatenated(), is_causal=True, enable_gqa=True)

    _add_peer(monkeypatch, "top_left", top_left)
    found = measure(TRAIN, "forward", repeats=1, only=("ours", "cat_mask", "top_left"))
    assert found.wrong == ["top_left"] and found.failures["top_left"].startswith("wrong: o is off by")
    assert set(found.timings) == {"ours", "cat_mask"}


def test_ours_is_the_wrong_one_when_it_differs_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(problem: Problem, x: Leaves) -> Callable[[], Tensor]:
        return lambda: torch.full_like(x.q, math.nan)

    ours = Candidate("ours", "", nothing, lambda problem, mode: None)
    monkeypatch.setattr(candidates_module, "_ours", lambda problem, mode: [ours])
    found = measure(TRAIN, "forward", repeats=1, only=("ours", "cat_mask", "cat_sdpa"))
    assert found.wrong == ["ours"] and set(found.timings) == {"cat_mask", "cat_sdpa"}


def test_a_failing_peer_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(problem: Problem, x: Leaves) -> Callable[[], Tensor]:
        raise torch.OutOfMemoryError("tried to allocate")

    _add_peer(monkeypatch, "hungry", out_of_memory)
    found = measure(TRAIN, "backward", repeats=1, only=("ours", "hungry"), skip={"cat_mask": "asked not to"})
    assert found.failures == {"hungry": "out of memory", "cat_mask": "asked not to"}
    assert list(found.timings) == ["ours"] and not found.wrong


def test_the_rule_takes_right_and_refuses_wrong() -> None:
    leaves = Leaves.random(TRAIN, requires_grad=True)
    got = results(leaves, causal=True, backend="auto")
    assert broken_rule(TRAIN, leaves, got) is None
    for name, x in got.items():
        assert (broken_rule(TRAIN, leaves, {**got, name: x * 1.001}) or "").startswith(f"{name}: error")
        assert broken_rule(TRAIN, leaves, {**got, name: torch.full_like(x, math.nan)})


def test_problems_are_checked() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        Problem.train(1, 4, 3, 8, 8, 16)
    with pytest.raises(ValueError, match="too small"):
        Problem.train(1, 4, 4, 0, 8, 16)
    with pytest.raises(ValueError, match="causal queries"):
        Problem(B=1, H=1, H_kv=1, S=4, T=3, P=0, D=8)


def test_saved_bytes_are_exact() -> None:
    x, w = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x * w) == 800
    assert saved_bytes(lambda: (x * w) * w, exclude=[w]) == 800  # x and the product; w twice, excluded
    assert saved_bytes(lambda: x[:10] * w[:10]) == 800  # a view keeps the whole
    assert saved_bytes(lambda: x + w) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: x * w) == 0


def test_views_of_parameters_are_not_counted() -> None:
    layer, x = torch.nn.Linear(8, 4, bias=False), torch.randn(3, 8, requires_grad=True)
    layer.weight.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), exclude=layer.parameters()) == 0
    assert saved_bytes(lambda: layer(x)) == 8 * 4 * 4
    with SavedBytes(exclude=[layer.weight]) as saved:
        torch.nn.functional.linear(x, layer.weight).exp()
    assert (saved.total, saved.count) == (3 * 4 * 4, 1)


def test_a_storage_that_is_gone_counts_on() -> None:
    """Its address is used again at once: only who holds the storage can tell the two apart."""
    x = torch.randn(1000, requires_grad=True)
    with SavedBytes(exclude=[x]) as saved:
        for _ in range(5):
            (x * 2.0).exp().sum()
    assert saved.total == 5 * 4000


def test_checkpointed_regions_count_their_inputs() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: checkpoint(lambda y: y.exp().exp().exp(), x, use_reentrant=False)) == 400


def test_floors_of_a_known_problem() -> None:
    tiny = Problem.train(1, 1, 1, 2, 1, 2)  # 5 pairs; q, o 4 numbers each, k and v 8, prefix 4; lse 8 bytes
    assert cost(tiny, "forward") == Cost(bytes=4 * 20 + 8, flops=2 * 2 * 2 * 5)
    # again q, o, do, lse, prefix and its gradients; four products of the two pairs with it
    lowest = Cost(bytes=4 * (20 + 12 + 8) + 16, flops=2 * 2 * 2 * 5 + 4 * 2 * 2 * 2)
    assert cost(tiny, "lowest") == lowest
    assert cost(tiny, "backward") == Cost(bytes=4 * (20 + 16 + 16 + 8) + 16, flops=7 * 2 * 2 * 5)
    decode = Problem.decode(2, 4, 2, 3, 5, 8, dtype=torch.bfloat16)
    assert cost(decode, "decode") == Cost(bytes=2 * (2 * 64 + 192 + 160) + 4 * 8, flops=2 * 2 * 8 * 8 * 8)
    peaks = Peaks(gb_s=1.0, tflop_s=1.0)
    assert peaks.seconds(Cost(bytes=10**9, flops=1)) == 1.0 and peaks.bound(Cost(10**9, 1)) == "memory"
    assert peaks.seconds(Cost(bytes=1, flops=2 * 10**12)) == 2.0 and peaks.bound(Cost(1, 10**12)) == "compute"


def test_turns_rotate_and_ratios_are_within_rounds() -> None:
    calls: list[str] = []
    fns = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleaved(fns, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(timing.samples) == 3 for timing in times.values())
    taken = {"slow": Timing((2.0, 40.0, 6.0)), "fast": Timing((1.0, 10.0, 2.0))}
    assert ratio(taken, "slow", "fast") == (3.0, 2.5, 3.5)
    assert taken["slow"].median == 6.0 and taken["slow"].best == 2.0 and Timing((1.0,)).quartiles == (1.0, 1.0)
    with pytest.raises(ValueError, match="0 candidates"):
        interleaved({})
