"""From a call of ``prefix_attention`` to the fields that kernels read, and back.

The fixture ``kernels`` computes the rows one by one as the fields say, or is the emulator with the CUDA kernels.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprefix import prefix_attention
from fastprefix.backends import cuda
from fastprefix.dispatch import UnsupportedError
from tests.cuda.emulated.operators import each_route
from tests.support.operator_calls import Call, arguments, make_call
from tests.support.operator_cases import CASES

DTYPES = (torch.bfloat16, torch.float16)


def attend(call: Call, backend: str = "cuda") -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return prefix_attention(**call.leaves, **call.options, return_lse=True, backend=backend)


def assert_right(call: Call, kernels: str) -> None:
    """As the reference in fp64, but for what o loses in half precision; kernels in the emulator by the error rule."""
    o, lse = attend(call)
    want, want_lse = attend(call.to(torch.float64), "reference")
    allowed = torch.finfo(o.dtype).eps * (3 if "gate" in call.options else 1)  # a gate adds up two that were rounded
    if kernels != "plain" and o.numel():
        allowed += 2 * (attend(call, "reference")[0].double() - want).abs().max().item()
    torch.testing.assert_close(o.double(), want, rtol=allowed, atol=allowed)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert o.shape == want.shape and o.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    assert o.dtype == call.leaves["q"].dtype and lse.dtype == torch.float32


EVERY = [*((name, "plain") for name in CASES), *each_route((name, make()) for name, make in CASES.items())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "kernels"), EVERY, indirect=["kernels"])
def test_every_argument(case: str, dtype: torch.dtype, kernels: str, poisoned_memory: None) -> None:
    call = CASES[case]().to(dtype)
    if dtype == torch.float16 and "sinks" in call.options:
        call.options["sinks"] = call.options["sinks"].float()  # some are as low as no fp16 number is
    try:
        assert_right(call, kernels)
    except UnsupportedError as error:
        assert {"bias", "dropout_p"} & call.options.keys(), str(error)


def aligned_pieces(call: Call) -> list[bool]:
    """Which of the five tensors are handed over as they are."""
    return [cuda.aligned(x) is x for x in call.leaves.values()]


LAYOUTS: dict[str, tuple[Any, bool]] = {
    "bhsd": (lambda x: x.contiguous(), True),
    "bshd": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
    "every_other_row": (lambda x: torch.stack([x, x * float("nan")], 3).flatten(2, 3)[:, :, ::2], True),
    "a_longer_cache": (lambda x: torch.cat([x, x * float("nan")], 2)[:, :, : x.shape[2]], True),
    "expanded": (lambda x: x[:1].expand_as(x), True),
    "one_row_for_all": (lambda x: x[:, :, :1].expand_as(x), True),
    "last_dim_strided": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), False),
    "off_by_one": (lambda x: torch.cat([x, x], 3)[..., 1 : 1 + x.shape[3]], False),
    "rows_of_odd_length": (lambda x: torch.cat([x, x[..., :1]], 3)[..., : x.shape[3]], False),
    "an_odd_address": (lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_few_copies(layout: str, kernels: str) -> None:
    call = make_call(B=3, dtype=torch.bfloat16)
    lay, kept = LAYOUTS[layout]
    with torch.no_grad():
        call.leaves = {n: lay(x) if x.dim() == 4 else x for n, x in call.leaves.items()}
    assert aligned_pieces(call) == [kept] * 3 + [True] * 2
    assert_right(call, kernels)


def test_one_row_by_itself_has_any_stride(kernels: str) -> None:
    call = make_call(B=1, H=2, H_kv=1, S=1, T=1, P=1, dtype=torch.bfloat16)
    with torch.no_grad():
        call.leaves = {
            n: x.contiguous().as_strided(x.shape, (3,) * (x.dim() - 1) + (1,)) for n, x in call.leaves.items()
        }
        call.leaves["q"] = call.leaves["q"].as_strided((1, 2, 1, 16), (7, 16, 5, 1)).clone()
    assert_right(call, kernels)
    assert aligned_pieces(call) == [True] * 5


@pytest.mark.parametrize("whole", [torch.int32, torch.int64])
def test_whole_numbers_as_they_lie(whole: torch.dtype, kernels: str) -> None:
    ids = torch.tensor([[0, 9], [9, 9], [1, 9]]).to(whole)[::2, 0]
    start = torch.tensor([3, 9, 5, 9]).to(whole)[::2]
    assert_right(make_call(S=2, T=9, N=3, prefix_ids=ids, q_start=start, dtype=torch.bfloat16), kernels)
    padding = torch.rand(9, 2) > 0.4
    padded = make_call(S=2, T=9, q_start=start[:1].expand(2), key_padding_mask=padding.t(), dtype=torch.float16)
    assert_right(padded, kernels)
    if kernels == "split_kv":
        return  # it takes no prefixes by token
    ids = torch.tensor([[0, 9, 2, 9], [9, 9, 9, 9], [1, 9, -1, 9]]).to(whole)[::2, ::2]
    assert_right(make_call(S=2, T=9, N=3, prefix_ids=ids, q_start=start, dtype=torch.bfloat16), kernels)


@pytest.mark.parametrize("whole", [torch.int32, torch.int64])
def test_lengths_as_they_lie(whole: torch.dtype, kernels: str) -> None:
    ids, lens = torch.tensor([2, 0]), torch.tensor([4, 9, 0, 9, 7, 9]).to(whole)[::2]
    assert_right(make_call(S=2, T=9, N=3, prefix_ids=ids, prefix_lens=lens, dtype=torch.bfloat16), kernels)


@pytest.mark.parametrize("prefix", [torch.float32, torch.float64, torch.float16])
def test_a_prefix_of_another_dtype(prefix: torch.dtype, kernels: str) -> None:
    call = make_call(dtype=torch.bfloat16, sinks=torch.randn(6, dtype=torch.float64))
    for name in ("prefix_k", "prefix_v"):
        call.leaves[name] = call.leaves[name].to(prefix)
    assert_right(call, kernels)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_bias_of_another_dtype_and_layout(kind: torch.dtype, kernels: str) -> None:
    bias = torch.randn(7, 2).to(kind).t()
    assert_right(make_call(dtype=torch.bfloat16, prefix_bias=bias), kernels)


def test_new_memory_is_poisoned(plain: Path, poisoned_memory: None) -> None:
    """What a kernel forgets to write is seen, in its workspace too."""
    library = ctypes.CDLL(str(plain))
    switch = ctypes.c_int.in_dll(library, "plain_writes")
    switch.value = 0
    try:
        o, lse = attend(make_call(dtype=torch.bfloat16))
        assert o.isnan().all() and lse.isnan().all()
    finally:
        switch.value = 1


def test_the_library_guesses_a_route(plain: Path) -> None:
    args = arguments(make_call(dtype=torch.bfloat16))
    route = ctypes.c_int.in_dll(ctypes.CDLL(str(plain)), "plain_route")
    for number, name in enumerate(cuda.DECODE_ROUTES, 1):
        route.value = number
        assert cuda.guess(args) == name
    route.value = 1
    for name in cuda.ROUTES:
        o, _ = cuda.fwd(args, name)
        assert o.isfinite().all()


def test_a_compiled_call(kernels: str) -> None:
    call = make_call(dtype=torch.bfloat16)
    x = {name: leaf.detach() for name, leaf in call.leaves.items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: prefix_attention(**{**x, "q": q}, backend="cuda"), backend="aot_eager")
    assert torch.equal(compiled(x["q"]), attend(call)[0])
