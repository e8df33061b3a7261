"""Decoding in Triton against truth: every argument, with both parts in several splits of odd lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastprefix.backends.launch import launcher, split_kv_decode, tile_config
from fastprefix.backends.launch.tile_config import Tile
from tests.support.operator_calls import Call, arguments, make_call
from tests.support.operator_cases import CASES, padding
from tests.support.operator_oracle import assert_close, eager, truth

pytestmark = [
    pytest.mark.skipif(not launcher.INTERPRETER, reason="judged by Triton's interpreter"),
    pytest.mark.usefixtures("poisoned_memory"),
]

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """How many multiprocessors there are: that decides the number of splits."""

    def set_to(number: int) -> None:
        monkeypatch.setattr(launcher, "num_sms", lambda x: number)

    set_to(6)
    return set_to


@contextmanager
def cut(**changes: Any) -> Iterator[None]:
    """Small tiles for both kernels: 16 rows and 16 keys."""
    tile = Tile(**{"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_P": 16, **changes})
    with tile_config.forced("decode_prefix", tile), tile_config.forced("decode_content", tile):
        yield


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with cut():
        yield


def decoded(call: Call) -> dict[str, torch.Tensor]:
    o, lse = split_kv_decode.fwd(arguments(call))
    return {"o": o, "lse": lse}


def check(call: Call) -> None:
    want = truth(call)
    assert_close(decoded(call), {name: want[name] for name in ("o", "lse")}, TOLERANCE[call.leaves["q"].dtype])


def splits(call: Call) -> tuple[int, int]:
    """Of the prefix and of the content."""
    args = arguments(call)
    return split_kv_decode._plan_prefix(args).splits, split_kv_decode._plan_content(args).splits


# Three tiles of content and three of prefix, the last ones not full.
def few_rows(**changes: Any) -> Call:
    return make_call(**{"B": 2, "H": 3, "H_kv": 1, "S": 3, "T": 45, "P": 37, **changes})


ARGUMENTS: dict[str, Callable[[], Call]] = {
    "plain": few_rows,
    "one_row": lambda: few_rows(S=1, H=1),
    "eight_heads_a_group": lambda: few_rows(S=1, H=16, H_kv=2, B=1),
    "sixteen_rows": lambda: few_rows(B=1, S=16),
    "three_tiles_of_rows": lambda: few_rows(B=1, S=7, H=6),
    "no_prefix": lambda: few_rows(P=0),
    "no_content": lambda: few_rows(T=0, causal=False),
    "wide": lambda: few_rows(B=1, D=64, D_v=80),
    "narrow": lambda: few_rows(B=1, D=80, D_v=33),
    "bidirectional": lambda: few_rows(causal=False),
    "scale": lambda: few_rows(scale=-0.5),
    "scale_zero": lambda: few_rows(scale=0.0),
    "softcap": lambda: few_rows(softcap=2.0, scale=-1.0),
    "q_start": lambda: few_rows(q_start=20),
    "q_start_per_sample": lambda: few_rows(q_start=torch.tensor([40, -2])),
    "window": lambda: few_rows(window=21),
    "left_padding": lambda: few_rows(key_padding_mask=padding(2, 45, "left")),
    "right_padding": lambda: few_rows(P=0, key_padding_mask=torch.arange(45) < torch.tensor([[3], [30]])),
    "segments": lambda: few_rows(segment_ids=(torch.arange(45) // 22).expand(2, -1)),
    "bias": lambda: few_rows(bias=torch.randn(3, 3, 45)),
    "bias_bool": lambda: few_rows(bias=torch.rand(2, 1, 1, 45) > 0.5),
    "sinks": lambda: few_rows(sinks=torch.tensor([0.5, -3.4e38, float("-inf")])),
    "bank": lambda: few_rows(B=4, T=9, N=3, prefix_ids=torch.tensor([2, -1, 0, 2])),
    "bank_ragged": lambda: few_rows(
        B=4,
        T=9,
        N=4,
        prefix_ids=torch.tensor([2, 1, 0, 2], dtype=torch.int32),
        prefix_lens=torch.tensor([37, 0, 18, 5]),
    ),
    "bank_per_row": lambda: few_rows(
        N=3, S=4, prefix_ids=torch.tensor([[0, 0, 1, -1], [2, 0, -1, 2]]), prefix_lens=torch.tensor([37, 2, 33])
    ),
    "bank_of_nothing": lambda: few_rows(N=2, P=0, prefix_ids=torch.tensor([1, 0])),
    "everything": lambda: few_rows(
        scale=0.2,
        softcap=3.0,
        N=2,
        prefix_ids=torch.tensor([[1, 1, 0], [0, -1, 0]]),
        prefix_lens=torch.tensor([20, 37]),
        key_padding_mask=padding(2, 45, "left"),
        segment_ids=(torch.arange(45) // 30).expand(2, -1),
        window=30,
        sinks=torch.randn(3),
        bias=torch.randn(3, 3, 45),
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument(name: str) -> None:
    call = ARGUMENTS[name]().to(torch.float32)
    assert max(splits(call)) > 1
    check(call)


@pytest.mark.parametrize("name", ["plain", "no_prefix", "wide", "softcap", "everything"])
def test_half_precision(name: str) -> None:
    check(ARGUMENTS[name]().to(torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_error_rule(dtype: torch.dtype) -> None:
    call = few_rows(B=1, D=64).to(dtype)
    got, peer, want = decoded(call), eager(call), truth(call)
    for name, x in got.items():
        mine, theirs = ((y.double() - want[name]).abs().max().item() for y in (x, peer[name]))
        assert mine <= 2 * theirs + torch.finfo(dtype).eps


def test_tiles_of_a_real_size() -> None:
    with cut(BLOCK_M=64, BLOCK_N=64, BLOCK_P=128):
        check(few_rows(B=5, H=8, H_kv=1, S=2, T=100, P=150))


EDGES = (
    "nothing_at_all",
    "no_rows",
    "no_samples",
    "more_rows_than_keys",
    "segments_without_content",
    "a_sample_all_padding",
    "q_start_before_the_keys",
    "sinks_off_in_an_empty_row",
    "sinks_as_low_as_a_mask",
    "sinks_no_prefix",
    "bank_and_padding",
)


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, processors: Callable[[int], None]) -> None:
    processors(1)
    check(CASES[name]().to(torch.float32))


@pytest.mark.parametrize(("number", "want"), [(1, (2, 1)), (2, (3, 2)), (4, (5, 3)), (1000, (5, 5))])
def test_any_number_of_splits_is_the_same_softmax(
    number: int, want: tuple[int, int], processors: Callable[[int], None]
) -> None:
    call = few_rows(H=1, S=1, B=3, T=66, P=79)
    processors(number)
    assert splits(call) == want
    check(call)


def test_splits_that_see_nothing(processors: Callable[[int], None]) -> None:
    """The host counts tiles of the capacity and of the longest prefix: the device finds fewer."""
    processors(100)
    lens = torch.tensor([3, 0])
    call = few_rows(q_start=torch.tensor([1, 30]), N=2, prefix_ids=torch.tensor([0, 1]), prefix_lens=lens)
    assert splits(call) == (3, 3)
    check(call)


@pytest.mark.parametrize("name", ["plain", "bank_per_row"])
def test_two_runs_are_bit_equal(name: str) -> None:
    call = ARGUMENTS[name]().to(torch.float32)
    first, second = decoded(call), decoded(call)
    assert torch.equal(first["o"], second["o"]) and torch.equal(first["lse"], second["lse"])


def test_what_a_static_cache_has_not_written_is_not_read() -> None:
    call = few_rows(T=70, q_start=torch.tensor([5, 33]))
    short = replace(call, leaves={n: x[:, :, :36] if n in "kv" else x for n, x in call.leaves.items()})
    want = decoded(short)
    with torch.no_grad():
        for name in "kv":
            call.leaves[name][0, :, 8:] = float("nan")
            call.leaves[name][1, :, 36:] = float("nan")
    assert_close(decoded(call), want, 1e-6)


@pytest.mark.parametrize("ids", [torch.tensor([2, 0, -1]), torch.tensor([[2, 0], [-1, -1], [0, 2]])])
def test_nan_in_a_bank_stays_where_it_is(ids: torch.Tensor) -> None:
    call = few_rows(B=3, S=2, T=4, N=3, prefix_ids=ids, prefix_lens=torch.tensor([19, 37, 37]))
    want = decoded(call)
    with torch.no_grad():
        for name in ("prefix_k", "prefix_v"):
            call.leaves[name][1] = float("nan")
            call.leaves[name][0, :, 19:] = float("nan")
    got = decoded(call)
    assert torch.equal(got["o"], want["o"]) and torch.equal(got["lse"], want["lse"])


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_one_sample_never_reaches_another() -> None:
    call = few_rows(B=3, T=20, P=5)
    want = decoded(call)["o"]
    with torch.no_grad():
        for name in "qkv":
            call.leaves[name][1] = float("nan")
    got = decoded(call)["o"]
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]) and got[1].isnan().all()


def test_any_strides() -> None:
    call = few_rows(B=2, H=6, H_kv=2, S=2)
    want = decoded(call)
    for name, x in call.leaves.items():
        spread = torch.stack([x.detach(), torch.full_like(x, float("nan"))], -1)[..., 0]
        call.leaves[name] = spread if name in ("q", "prefix_k") else x.detach().mT.contiguous().mT
    assert_close(decoded(call), want, 1e-6)


@pytest.mark.parametrize("name", ["plain", "wide", "q_start_per_sample", "bank", "bank_ragged", "bank_per_row"])
def test_descriptors(name: str) -> None:
    """Hopper's copy engine, as the interpreter has it."""
    call = ARGUMENTS[name]().to(torch.float16 if name == "wide" else torch.float32)
    seen: list[dict[str, Any]] = []
    with cut(TMA=True):
        check(call)
        with launcher.dry_run(lambda kernel, grid, args, options: seen.append(options), 0):
            decoded(call)
    assert [x["TMA"] for x in seen[:2]] == [call.options.get("prefix_lens") is None, True]


@pytest.mark.parametrize("name", ["no_prefix", "no_content", "sinks", "bank_per_row"])
def test_the_log_sum_exp_of_the_prefix(name: str) -> None:
    args = arguments(ARGUMENTS[name]().to(torch.float32))
    prefix_lse = args.q.new_empty(args.q.shape[:3])
    o, _ = split_kv_decode.fwd(args, prefix_lse)
    alone = replace(args, k=args.k[:, :, :0], v=args.v[:, :, :0], sinks=None, causal=False)
    assert_close({"lse": prefix_lse}, {"lse": split_kv_decode.fwd(alone)[1]}, 2e-6)
    assert torch.equal(o, split_kv_decode.fwd(args)[0])


def test_a_part_without_keys_is_not_launched() -> None:
    names: list[str] = []
    with launcher.dry_run(lambda kernel, grid, args, options: names.append(kernel.__name__), 0):
        for name in ("plain", "no_prefix", "no_content"):
            decoded(ARGUMENTS[name]())
    parts = [name.removeprefix("_prefix_attn_decode_").removesuffix("_kernel") for name in names]
    assert parts == ["prefix", "content", "combine", "content", "combine", "prefix", "combine"]


def test_large_scores_stay_finite() -> None:
    call = few_rows()
    with torch.no_grad():
        for x in call.leaves.values():
            x.mul_(100.0)
    assert all(x.isfinite().all() for x in decoded(call).values())
