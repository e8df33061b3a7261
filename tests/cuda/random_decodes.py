"""Random calls of decoding: every argument that the kernels take, in sizes that an emulator gets done."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastprefix import reference
from fastprefix.types import AttentionArgs

HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (80, 80), (64, 128), (192, 128), (8, 16), (96, 40))


def random_decode(random: Random) -> AttentionArgs:
    """B 1 to 5, G 1 to 16, S 1 to 5, T and P 0 to 300, and now and then each of the other arguments."""
    B, H_kv, G = random.choice([1, 2, 3, 5]), random.choice([1, 2, 3]), random.choice([1, 2, 3, 4, 6, 8, 16])
    S, T, P = (
        random.choice([1, 1, 1, 2, 5]),
        random.choice([0, 1, 7, 64, 130, 200, 300]),
        random.choice([0, 1, 7, 16, 64, 129, 300]),
    )
    (D, D_v), N = random.choice(HEAD_DIMS), random.choice([1, 2, 5])
    dtype, generator = (
        random.choice([torch.bfloat16, torch.float16]),
        torch.Generator().manual_seed(random.randrange(1 << 30)),
    )

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        x = torch.randint(low, high + 1, shape, generator=generator)
        return x.int() if random.random() < 0.5 else x

    def sometimes(chance: float) -> bool:
        return random.random() < chance

    options: dict[str, Any] = {
        "causal": sometimes(0.7),
        "scale": random.choice([0.0, -0.5, 0.3, D**-0.5, D**-0.5, D**-0.5]),
    }
    if sometimes(0.3):
        options["key_padding_mask"] = torch.rand(B, T, generator=generator) > 0.4
    if sometimes(0.3):
        starts = (random.randrange(-2, T + 3), integers(-2, T + 2, B), torch.tensor(T // 2))
        options["q_start"] = random.choice(starts)
    if options["causal"] and sometimes(0.3):
        options["window"] = random.choice([1, 5, 70])
    if sometimes(0.2):
        options["softcap"] = random.choice([0.5, 5.0, 50.0])
    if sometimes(0.2):
        options["sinks"] = torch.randn(H_kv * G, generator=generator)
    bank, lead = random.choice(["none", "none", "padded", "ragged", "packed"]), ()
    if bank != "none":
        options["prefix_ids"] = integers(-1, N - 1, *((B, S) if sometimes(0.4) else (B,)))
        lead = (N,)
    if bank == "ragged":
        options["prefix_lens"] = integers(0, P, N)
    if bank == "packed":
        options["prefix_lens"] = integers(0, 90, N)
        lead, P = (), int(options["prefix_lens"].sum())
    # [B, S, H, D] storage, as models hold it, but for the cache, which may be either.
    cache = [numbers(B, T, H_kv, x).transpose(1, 2) if sometimes(0.5) else numbers(B, H_kv, T, x) for x in (D, D_v)]
    prefix = [numbers(*lead, H_kv, P, x) for x in (D, D_v)]
    return AttentionArgs(numbers(B, S, H_kv * G, D).transpose(1, 2), *cache, *prefix, **options)


def routes(args: AttentionArgs) -> list[str]:
    """Those that take such a call: rows of a sample with prefixes of their own go by one."""
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
