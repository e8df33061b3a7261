"""What the backend refuses and why, who may take it, and that nobody waits until a backward to learn it has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprefix import dispatch, explain, prefix_attention
from fastprefix.backends import cuda
from fastprefix.cuda_library import library
from fastprefix.dispatch import UnsupportedError
from fastprefix.types import AttentionArgs, Needs
from fastprefix.verification import lookup, ranking, store
from fastprefix.verification.cells import DIRECTIONS, cell_of
from fastprefix.verification.routes import routes
from fastprefix.verification.table import Verdict
from tests.support.operator_calls import arguments, make_call

BF16 = torch.bfloat16
# Its decoding takes wider heads than its backward.
WIDE: dict[str, Any] = {"dtype": BF16, "D": 256, "D_v": 16}
GRADIENTS = "gradients: q: head dim 256, its kernels take multiples of 8 up to 128"


def args(**options: Any) -> AttentionArgs:
    return arguments(make_call(**{"dtype": BF16, **options}))


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float32}, "dtype torch.float32: its kernels take bf16 and fp16"),
    ({"S": 17, "D": 136, "D_v": 16}, "q: head dim 136, its kernels take multiples of 8 up to 128"),
    ({"D": 12, "D_v": 16}, "q: head dim 12, its kernels take multiples of 8 up to 256"),
    ({"D_v": 264}, "v: head dim 264, its kernels take multiples of 8 up to 256"),
    ({"window": 2**31}, "window: at most 2147483647"),
    ({"segment_ids": torch.zeros(2, 5, dtype=torch.long), "D": 256}, "segment_ids: not in its kernels that decode"),
    ({"bias": torch.zeros(5)}, "bias: not in its kernels"),
    ({"dropout_p": 0.1}, "dropout_p: not in its kernels"),
]


@pytest.mark.usefixtures("plain")
class TestUnsupported:
    @pytest.mark.parametrize(("options", "reason"), REASONS)
    def test_each_reason(self, options: dict[str, Any], reason: str) -> None:
        assert cuda.unsupported(args(**options)) == [reason]

    def test_all_at_once(self) -> None:
        both = replace(args(dtype=torch.float32, S=17, dropout_p=0.5), bias=torch.zeros(17))
        assert len(cuda.unsupported(both)) == 3

    def test_what_it_takes(self) -> None:
        for options in ({}, {"S": 16}, {"D": 256, "D_v": 8}, {"H": 64, "H_kv": 1}, {"T": 0, "P": 0}):
            assert cuda.unsupported(args(**options)) == [] == cuda.unsupported(args(**options), "cascade")
        for options in ({"S": 17}, {"segment_ids": torch.zeros(2, 5, dtype=torch.long)}):
            assert cuda.unsupported(args(**options)) == [] == cuda.unsupported(args(**options), "fused")
            assert cuda.guess(args(**options)) == "fused"

    def test_what_a_route_does_not_take(self) -> None:
        many = args(S=17)
        assert cuda.unsupported(many, "split_kv") == ["q: 17 tokens, at most 16 are decoded"]
        wide = ["q: head dim 256, its kernels take multiples of 8 up to 128"]
        assert cuda.unsupported(args(D=256, D_v=16), "fused") == wide
        by_token = args(N=2, prefix_ids=torch.zeros(2, 5, dtype=torch.long))
        assert cuda.unsupported(by_token, "split_kv") == ["split_kv: takes one prefix for all tokens of a sample"]
        assert cuda.unsupported(by_token, "cascade") == [] == cuda.unsupported(by_token)

    def test_another_device(self) -> None:
        moved = replace(args(), q=args().q.to("meta"))
        assert cuda.unsupported(moved) == ["device meta: its kernels are for cpu"]

    def test_rows_that_no_kernel_can_count(self) -> None:
        many = replace(args(), q=torch.empty(1, 1, 1, 8, dtype=BF16).expand(2**20, 2**8, 16, 8))
        assert cuda.unsupported(many) == ["q: more than 2147483647 rows"]


def test_without_a_library_the_reason_is_told() -> None:
    """On this device too: both reasons hold."""
    found = cuda.unsupported(args())
    assert found == [library.load().absence, "device cpu: its kernels are for cuda"] or torch.version.cuda
    assert all("\n" not in reason for reason in found)
    assert cuda.routes("cpu") == ()
    with pytest.raises(UnsupportedError, match="device cpu: its kernels are for cuda"):
        prefix_attention(**make_call(dtype=BF16).leaves, backend="cuda")


def test_an_old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.machine, "compute_capability", lambda place: 75)
    with cuda.emulated(None, device_type="cuda"):
        place = type("Q", (), {"device": torch.device("cuda:0"), "dtype": BF16, "shape": (1, 1, 1, 64)})()
        found = cuda.unsupported(replace(args(D=64), q=place))
    assert found == ["device: compute capability 7.5, the kernels need 8.0"]


@pytest.mark.usefixtures("plain")
class TestGradients:
    """The call is refused at its forward, by its own name for what is missing."""

    plain = {name: leaf.detach() for name, leaf in make_call(**WIDE).leaves.items()}

    def call(self, **changed: Any) -> Any:
        return prefix_attention(**{**self.plain, **changed}, backend="cuda")

    @pytest.mark.parametrize("name", ["q", "k", "v", "prefix_k", "prefix_v"])
    def test_a_leaf(self, name: str) -> None:
        leaf = make_call(**WIDE).leaves[name]
        with pytest.raises(UnsupportedError, match=GRADIENTS):
            self.call(**{name: leaf})
        with torch.no_grad():
            assert self.call(**{name: leaf}).isfinite().all()

    def test_every_reason_is_told(self) -> None:
        q = make_call(**WIDE).leaves["q"]
        with pytest.raises(UnsupportedError, match=r"(?s)dropout_p: .*gradients: "):
            self.call(q=q, dropout_p=0.5)

    def test_a_transform(self) -> None:
        q = self.plain["q"]
        with pytest.raises(UnsupportedError, match=GRADIENTS):
            torch.func.grad(lambda x: self.call(q=x).float().sum())(q)
        assert torch.vmap(lambda x: self.call(q=x))(q[None]).isfinite().all()

    def test_a_compiled_call(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: self.call(q=x), backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=GRADIENTS):
            compiled(make_call(**WIDE).leaves["q"])

    def test_the_operator_of_torch(self) -> None:
        with pytest.raises(UnsupportedError, match=GRADIENTS):
            dispatch.choose(args(**WIDE), "cuda", "backward")
        x, o = args(**WIDE), torch.zeros(2, 6, 5, 16, dtype=BF16)
        with pytest.raises(UnsupportedError, match=GRADIENTS):
            cuda.bwd(x, o, o[..., 0].float(), o, Needs(*[True] * 5))

    def test_explain(self) -> None:
        trained, plain = explain(**make_call(**WIDE).leaves), explain(**self.plain)
        assert f"\ncuda       cannot: {GRADIENTS}" in trained
        assert "\ncuda       can, by name only: " in plain


@pytest.mark.usefixtures("plain")
class TestAuto:
    """Only a proof on the device lets it be taken."""

    def test_it_is_no_guess(self) -> None:
        assert all(x.module is not cuda for x in lookup.unproved(args(), "forward"))
        assert all(x.module is not cuda for x in ranking.known(args(), "forward"))
        assert dispatch.choose(args(), "auto").module is not cuda

    def test_two_of_its_routes_decode_alone(self) -> None:
        own = [f"cuda:{name}" for name in cuda.ROUTES]
        for direction in DIRECTIONS:
            found = [name for name in routes("cpu", direction) if name.startswith("cuda:")]
            assert found == (own if direction == "decode" else ["cuda:fused"])
        assert not any(name.startswith("cuda:") for name in routes("meta", "decode"))

    def test_a_proof(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("FASTPREFIX_CACHE", str(tmp_path))
        monkeypatch.setenv("FASTPREFIX_VERIFY", "first-use")
        store.forget()
        try:
            x = args()
            table = store.table(x.q.device)
            table.add(cell_of(x, "decode"), "cuda:cascade", Verdict("right", 0.5, "", "2026-11-27"))
            found = dispatch.choose(x, "auto")
            assert (found.module, found.route) == (cuda, "cascade")
            assert dispatch.choose(x, "auto", "backward").module is not cuda
            leaves = make_call(dtype=BF16).leaves
            prefix_attention(**leaves).float().sum().backward()  # another backend's backward
            assert all(leaf.grad is not None for leaf in leaves.values())
        finally:
            store.forget()
