"""Random calls: every argument that the CUDA kernels take, in sizes that an emulator gets done."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastprefix import reference
from fastprefix.types import AttentionArgs

HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (80, 80), (64, 128), (192, 128), (8, 16), (96, 40))


class Draw:
    """What random calls are made of."""

    def __init__(self, random: Random) -> None:
        self.choice, self.sometimes = random.choice, lambda chance: random.random() < chance
        self.generator = torch.Generator().manual_seed(random.randrange(1 << 30))
        self.dtype = random.choice([torch.bfloat16, torch.float16])

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        x = torch.randint(low, high + 1, shape, generator=self.generator)
        return x.int() if self.sometimes(0.5) else x

    def prefix_bias(self, *shape: int) -> Tensor:
        """Moderate or large numbers, some of which hide their tokens."""
        bias = torch.randn(shape, generator=self.generator) * self.choice([1.0, 100.0])
        hides = self.choice([0.0, 0.3, 1.0])
        bias[torch.rand(shape, generator=self.generator) < hides] = self.choice([float("-inf"), -3.4e38, -1.1e37])
        return bias

    def call(
        self, B: int, H_kv: int, G: int, S: int, T: int, P: int, D: int, D_v: int, segments: bool, windows: list[int]
    ) -> AttentionArgs:
        """A call of these sizes, with each other argument now and then."""
        sometimes, N = self.sometimes, self.choice([1, 2, 5])
        options: dict[str, Any] = {"causal": sometimes(0.7)}
        options["scale"] = self.choice([0.0, -0.5, 0.3, *[D**-0.5] * 3])
        if sometimes(0.3):
            options["key_padding_mask"] = torch.rand(B, T, generator=self.generator) > 0.4
        if segments and sometimes(0.3):
            options["segment_ids"] = torch.sort(self.integers(0, 3, B, T), 1)[0]
        if sometimes(0.3):
            starts = (int(self.integers(-2, T + 3)), self.integers(-2, T + 2, B), torch.tensor(T // 2))
            options["q_start"] = self.choice(starts)
        if options["causal"] and sometimes(0.3):
            options["window"] = self.choice(windows)
        if sometimes(0.2):
            options["softcap"] = self.choice([0.5, 5.0, 50.0])
        if sometimes(0.2):
            options["sinks"] = torch.randn(H_kv * G, generator=self.generator)
        bank: str = self.choice(["none", "none", "padded", "ragged", "packed"])
        lead: tuple[int, ...] = () if bank in ("none", "packed") else (N,)
        if bank != "none":
            options["prefix_ids"] = self.integers(-1, N - 1, *((B, S) if sometimes(0.4) else (B,)))
        if bank == "ragged":
            options["prefix_lens"] = self.integers(0, P, N)
        if bank == "packed":
            options["prefix_lens"] = self.integers(0, 90, N)
            P = int(options["prefix_lens"].sum()) + self.choice([0, 0, 5, 140])  # tokens that no prefix has, too
        # [B, S, H, D] storage, as models hold it, but for the cache, which may be either.
        by_token = sometimes(0.5)
        cache = [
            self.numbers(B, T, H_kv, x).transpose(1, 2) if by_token else self.numbers(B, H_kv, T, x) for x in (D, D_v)
        ]
        prefix = [self.numbers(*lead, H_kv, P, x) for x in (D, D_v)]
        if sometimes(0.3):
            options["prefix_bias"] = self.prefix_bias(*lead, H_kv, P)
        return AttentionArgs(self.numbers(B, S, H_kv * G, D).transpose(1, 2), *cache, *prefix, **options)


def random_decode(random: Random) -> AttentionArgs:
    """B 1 to 5, G 1 to 16, S 1 to 5, T and P 0 to 300, head dims up to 256."""
    draw = Draw(random)
    B, H_kv, G = draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 4, 6, 8, 16])
    S, T = draw.choice([1, 1, 1, 2, 5]), draw.choice([0, 1, 7, 64, 130, 200, 300])
    P, dims = draw.choice([0, 1, 7, 16, 64, 129, 300]), draw.choice(HEAD_DIMS)
    return draw.call(B, H_kv, G, S, T, P, *dims, segments=False, windows=[1, 5, 70])


def random_forward(random: Random) -> AttentionArgs:
    """B 1 and 2, G 1 to 8, S 1 to 200, T 0 to 330, P 0 to 200, head dims up to 128; packed documents too."""
    draw = Draw(random)
    B, H_kv, S = draw.choice([1, 1, 2]), draw.choice([1, 2]), draw.choice([1, 5, 64, 100, 130, 200])
    G = draw.choice([1, 2, 3, 4, 6, 8] if S <= 64 else [1, 2, 3])
    T, P = draw.choice([S, S, S + 37, S + 130, 7, 0]), draw.choice([0, 1, 16, 17, 64, 100, 129, 200])
    dims = draw.choice([x for x in HEAD_DIMS if max(x) <= 128])
    return draw.call(B, H_kv, G, S, T, P, *dims, segments=True, windows=[1, 5, 70, 150])


def decode_routes(args: AttentionArgs) -> list[str]:
    """Those of decoding that take such a call: rows of a sample with prefixes of their own go by one."""
    by_row = args.prefix_ids is not None and args.prefix_ids.dim() == 2
    return ["cascade"] if by_row else ["split_kv", "cascade"]


def in_fp64(args: AttentionArgs) -> AttentionArgs:
    """The same numbers."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    doubled = {name: x.double() for name, x in fields.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return dataclasses.replace(args, **doubled)


def assert_right(args: AttentionArgs, o: Tensor, lse: Tensor) -> None:
    """The error rule: twice the error of the reference in the same dtype, both against fp64."""
    want_o, want_lse = reference.fwd(in_fp64(args))
    peer_o, _ = reference.fwd(args)
    assert not o.isnan().any() and torch.equal(lse.isinf(), want_lse.isinf())
    if not o.numel():
        return
    error, allowed = ((x.double() - want_o).abs().max().item() for x in (o, peer_o))
    assert error <= 2 * allowed + torch.finfo(o.dtype).eps * max(1.0, want_o.abs().max().item()), (error, allowed)
    finite = want_lse.isfinite()
    assert torch.allclose(lse[finite].double(), want_lse[finite], rtol=1e-4, atol=1e-4)
