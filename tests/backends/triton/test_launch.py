"""The Triton launches beyond what every backend is held to: descriptors, splits, what is not launched, the mass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastprefix.backends import triton as backend
from fastprefix.backends.launch import launcher, prefix_bank, tile_config
from fastprefix.backends.launch.tile_config import Tile
from fastprefix.types import AttentionArgs, Needs
from tests.support.operator_calls import Call, make_call
from tests.support.operator_calls import run as run_call
from tests.support.operator_oracle import assert_close, assert_within_rule, truth

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.slow]

EVERYTHING = Needs(True, True, True, True, True)


def impose(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> list[str]:
    """This tile for every kernel; the names of those that asked."""
    asked: list[str] = []

    def fixed(kernel: str, *shape: Any) -> Tile:
        asked.append(kernel)
        return tile

    monkeypatch.setattr(tile_config, "tile", fixed)
    monkeypatch.setattr(tile_config, "has", lambda kernel, *shape: True)
    return asked


TMA_CALLS = {
    "gqa": lambda: make_call(B=2, H=8, H_kv=2, S=37, P=21, D=32),
    "mha": lambda: make_call(B=1, H=2, H_kv=2, S=33, P=5, D=16),
    "three_heads_a_group": lambda: make_call(B=1, H=6, H_kv=2, S=20, P=5, D=16),
    "a_cache": lambda: make_call(B=2, H=4, H_kv=1, S=3, T=40, P=7, D=16),
    "odd_head_dims": lambda: make_call(B=2, H=4, H_kv=2, S=20, P=7, D=24, D_v=40),
    "no_prefix": lambda: make_call(B=2, H=4, H_kv=2, S=20, P=0, D=16),
    "no_content": lambda: make_call(B=2, H=4, H_kv=2, S=20, T=0, P=7, D=16, causal=False),
    "padding": lambda: make_call(
        B=2, H=4, H_kv=2, S=20, P=7, D=16, key_padding_mask=torch.arange(20).ge(torch.tensor([[3], [0]]))
    ),
    "window": lambda: make_call(B=2, H=4, H_kv=2, S=40, P=7, D=16, window=9),
    "bank": lambda: make_call(B=3, H=4, H_kv=2, S=9, P=7, D=16, N=4, prefix_ids=torch.tensor([3, -1, 0])),
}


@pytest.mark.parametrize("name", TMA_CALLS)
def test_descriptors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's copy engine, as the interpreter has it: zeros outside, boxes of whole groups."""
    asked = impose(monkeypatch, Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_P=16, TMA=True))
    call = TMA_CALLS[name]()
    assert_close(run_call(call, "triton"), truth(call), 1e-5)
    general = {kernel for kernel in asked if kernel.endswith(tile_config.GENERAL)}
    assert general == ({"bwd_dkdv_general"} if name == "three_heads_a_group" else set())


@pytest.mark.parametrize("what", ["key_rows_of_odd_bytes", "softcap", "a_repeated_output_gradient"])
def test_what_descriptors_cannot_take_goes_by_pointers(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = impose(monkeypatch, Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_P=16, TMA=True))
    call = make_call(B=2, H=4, H_kv=2, S=20, P=7, D=16)
    if what == "softcap":
        call.options["softcap"] = 2.0
    if what == "key_rows_of_odd_bytes":
        wide = torch.randn(2, 2, 20, 17)
        call.leaves["k"] = wide[..., :16].requires_grad_()
    if what != "a_repeated_output_gradient":
        assert_close(run_call(call, "triton"), truth(call), 1e-5)
        assert "fwd_general" in asked and "bwd_dq_general" in asked
        return
    args = AttentionArgs(**{n: x.detach() for n, x in call.leaves.items()}, scale=0.25)
    o, lse = backend.fwd(args)
    do = torch.ones(()).expand(o.shape)
    asked.clear()
    repeated, plain = (backend.bwd(args, o, lse, x, EVERYTHING) for x in (do, do.contiguous()))
    assert "bwd_dkdv_general" in asked
    for a, b in zip(repeated, plain, strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_of_a_real_size(split: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    impose(monkeypatch, Tile(BLOCK_M=128, BLOCK_N=64, BLOCK_P=64, SPLIT=split))
    call = make_call(B=2, H=4, H_kv=1, S=130, P=129, D=64, dtype=dtype)
    assert_within_rule(run_call(call, "triton"), call)


@pytest.mark.parametrize("processors", [1, 3, 1000])
def test_any_number_of_splits_gives_the_prefix_its_gradient(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "num_sms", lambda x: processors)
    call = make_call(B=3, H=4, H_kv=2, S=23, P=19, D=16)
    assert_close(run_call(call, "triton"), truth(call), 1e-5)


def launched(call: Call, needs: Needs) -> list[str]:
    """Names of the backward's kernels, in order, without launching them."""
    names: list[str] = []
    args = AttentionArgs(**{n: x.detach() for n, x in call.leaves.items()}, scale=0.25, **call.options)
    o, lse = backend.fwd(args)
    with launcher.dry_run(lambda kernel, grid, arguments, options: names.append(kernel.__name__), 0, "interpreter"):
        grads = backend.bwd(args, o, lse, o, needs)
    assert [x is not None for x in grads] == list(needs)
    return [name.removeprefix("_prefix_attn_bwd_").removesuffix("_kernel") for name in names]


def test_what_nothing_needs_is_not_launched() -> None:
    call = make_call(B=3, H=4, H_kv=2, S=23, P=19, D=16)
    assert launched(call, EVERYTHING) == ["delta", "dq", "dkdv", "dprefix", "reduce"]
    assert launched(call, Needs(False, False, False, True, True)) == ["dprefix", "reduce"]
    assert launched(call, Needs(True, False, False, False, False)) == ["delta", "dq"]
    assert launched(call, Needs(False, True, True, False, False)) == ["delta", "dkdv"]
    assert launched(call, Needs(False, False, False, False, True)) == ["dprefix", "reduce"]


def test_one_gradient_of_a_pair_is_that_gradient() -> None:
    call = make_call(B=2, H=4, H_kv=2, S=9, P=5, D=16)
    args = AttentionArgs(**{n: x.detach() for n, x in call.leaves.items()}, scale=0.25)
    o, lse = backend.fwd(args)
    do = torch.randn(o.shape)
    whole = backend.bwd(args, o, lse, do, EVERYTHING)
    for field in ("k", "v", "prefix_k", "prefix_v"):
        alone = backend.bwd(args, o, lse, do, Needs(**{n: n == field for n in ("q", "k", "v", "prefix_k", "prefix_v")}))
        assert torch.allclose(getattr(alone, field), getattr(whole, field), atol=1e-6), field


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ({"B": 256, "S": 1, "P": 8192, "T": 512}, ["decode_prefix", "decode_content", "decode_combine"]),
        ({"B": 1, "S": 1, "P": 0, "T": 8192}, ["decode_content", "decode_combine"]),
        ({"B": 8, "S": 2048, "P": 16}, ["fwd"]),
        ({"B": 64, "S": 1, "P": 0, "T": 64}, ["fwd"]),
    ],
)
def test_the_forward_is_split_where_rows_are_few(shape: dict[str, int], kernels: list[str]) -> None:
    batch, seq, keys = shape["B"], shape["S"], shape.get("T", shape["S"])
    sizes = {"q": (batch, 32, seq, 128), "k": (batch, 8, keys, 128), "prefix_k": (8, shape["P"], 128)}
    sizes |= {"v": sizes["k"], "prefix_v": sizes["prefix_k"]}
    leaves = {name: torch.empty(sizes[name], device="meta", dtype=torch.bfloat16) for name in sizes}
    names: list[str] = []
    with launcher.dry_run(lambda kernel, grid, arguments, options: names.append(kernel.__name__), 90):
        backend.fwd(AttentionArgs(**leaves, scale=0.1))
    assert names == [f"_prefix_attn_{name}_kernel" for name in kernels]


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"P": 0}, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}])
def test_the_mass_on_the_prefix(options: dict[str, Any]) -> None:
    options = dict(options)
    call = make_call(B=2, H=4, H_kv=2, S=9, P=options.pop("P", 5), D=16, **options)
    args = AttentionArgs(**{n: x.detach() for n, x in call.leaves.items()}, scale=0.25, **call.options)
    o, lse, mass = backend.fwd_with_mass(args)
    scores = args.q @ args.prefix_k.repeat_interleave(2, 0).transpose(-1, -2) * 0.25
    torch.testing.assert_close(mass, torch.exp(scores - lse[..., None]).sum(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(o, backend.fwd(args)[0])


def test_a_large_bank_of_which_few_are_used() -> None:
    ids = torch.tensor([[77, 77, 3, 3, -1], [50, 3, 77, 77, 99]])
    call = make_call(B=2, H=2, H_kv=1, S=5, P=3, D=16, N=100, prefix_ids=ids, prefix_lens=torch.arange(100) % 4)
    assert_close(run_call(call, "triton"), truth(call), 1e-5)


def test_a_packed_bank_is_spread_out_for_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(B=3, packed=(3, 0, 5), prefix_ids=torch.tensor([2, -1, 0]))
    given = AttentionArgs(**{n: x.detach() for n, x in call.leaves.items()}, scale=0.25, **call.options)
    args = prefix_bank.to_padded(given)
    assert args.prefix_k.shape == (3, 2, 5, 16) and not args.packed and prefix_bank.to_padded(args) is args
    assert torch.equal(args.prefix_k[2], given.prefix_k[:, 3:]) and torch.equal(
        args.prefix_v[0, :, :3], given.prefix_v[:, :3]
    )
    back = prefix_bank.to_packed(args.prefix_k, given)
    assert back is not None and torch.equal(back, given.prefix_k)
    for a, b in zip(backend.fwd_with_mass(given), backend.fwd_with_mass(args), strict=True):
        assert torch.equal(a, b)
    names = ("q", "k", "v", "prefix_k", "prefix_v", "prefix_ids", "prefix_lens")
    there = replace(given, **{name: getattr(given, name).to("meta") for name in names})
    assert prefix_bank.to_padded(there).prefix_k.shape == (3, 2, 8, 16), "lengths that cannot be read: room for any"


def test_reasons_in_words() -> None:
    def reasons(**changes: Any) -> str:
        call = make_call(**changes.pop("shape", {}))
        args = AttentionArgs(**{n: x.detach() for n, x in call.leaves.items()}, scale=1.0, **changes)
        return "; ".join(backend.unsupported(args))

    assert reasons() == ""
    assert "float64" in reasons(shape={"dtype": torch.float64})
    assert "head dim 257" in reasons(shape={"D": 257})
    assert "dropout_p" in reasons(dropout_p=0.1)
    assert "bias" in reasons(bias=torch.zeros(5, 5), bias_grad=True)


@pytest.mark.parametrize("causal", [True, False])
def test_a_document_walks_its_own_tiles_only(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """nan in the tiles of one document shows whether another's rows and keys so much as read them."""
    impose(monkeypatch, Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_P=16))
    call = make_call(B=1, H=1, H_kv=1, S=64, P=3, D=16, causal=causal, segment_ids=(torch.arange(64) // 32)[None])
    leaves = {name: x.detach().clone() for name, x in call.leaves.items()}
    for name in ("q", "k", "v"):
        leaves[name][:, :, :32] = float("nan")
    args = AttentionArgs(**leaves, scale=0.25, **call.options)
    o, lse = backend.fwd(args)
    grads = backend.bwd(args, o, lse, torch.ones_like(o), EVERYTHING)
    assert o[:, :, :32].isnan().all() and o[:, :, 32:].isfinite().all()
    assert all(x is not None and x[:, :, 32:].isfinite().all() for x in (grads.q, grads.k, grads.v))
