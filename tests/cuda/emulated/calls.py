"""The kernels in the emulator, called as C++ calls them: without torch's operators in front."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from fastprefix.types import AttentionArgs
from tests.emulator.build import ROOT, library
from tests.emulator.session import Mode, Session

ROUTES = {"split_kv": 1, "cascade": 2, "fused": 0}


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row"))]

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x.data_ptr(), *(0,) * (4 - x.dim()), *x.stride()[:-1])


class Integers(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("bytes", "batch", "row"))]

    @classmethod
    def of(cls, x: object) -> Integers:
        if not isinstance(x, Tensor):
            return cls(None, 8, 0, 0)
        return cls(x.data_ptr(), x.element_size(), *(*x.stride(), 0, 0)[:2])


class Call(ctypes.Structure):
    """``AttentionCall`` of kernels/cuda/attention_call.h."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "prefix_k", "prefix_v", "o")),
        *((name, ctypes.c_void_p) for name in ("lse", "sinks", "prefix_bias")),
        *((name, Integers) for name in ("prefix_ids", "prefix_lens", "q_start", "segments")),
        ("padding", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("padding_batch", "padding_key", "start")),
        *((name, ctypes.c_int32) for name in ("B", "H", "H_kv", "S", "T", "D", "D_v", "P", "N")),
        *((name, ctypes.c_int32) for name in ("window", "causal", "packed", "ids_by_row")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("dtype", "route", "device")),
    ]

    @classmethod
    def of(cls, args: AttentionArgs, o: Tensor, lse: Tensor, sinks: Tensor | None, route: str) -> Call:
        B, H, S, D = args.q.shape
        keys, start, padding, ids = args.k.shape[2], args.q_start, args.key_padding_mask, args.prefix_ids
        call = cls()
        for name, x in (("q", args.q), ("k", args.k), ("v", args.v), ("o", o)):
            setattr(call, name, Rows.of(x))
        call.prefix_k, call.prefix_v = Rows.of(args.prefix_k), Rows.of(args.prefix_v)
        call.lse, call.sinks = lse.data_ptr(), None if sinks is None else sinks.data_ptr()
        if args.prefix_bias is not None and args.prefix_bias.numel():
            call.prefix_bias = args.prefix_bias.data_ptr()
        call.prefix_ids, call.prefix_lens, call.q_start = (Integers.of(x) for x in (ids, args.prefix_lens, start))
        call.segments = Integers.of(args.segment_ids)
        if padding is not None:
            call.padding, call.padding_batch, call.padding_key = padding.data_ptr(), *padding.stride()
        call.start = start if isinstance(start, int) else keys - S
        call.B, call.H, call.H_kv, call.S, call.T, call.D, call.D_v = B, H, args.k.shape[1], S, keys, D, args.v.shape[3]
        call.P, call.N = args.num_prefix_tokens, args.num_prefixes
        call.window, call.causal, call.packed = args.window or 0, args.causal, args.packed
        call.ids_by_row = ids is not None and ids.dim() == 2
        call.scale, call.softcap = args.scale, args.softcap or 0.0
        call.dtype, call.route = [torch.bfloat16, torch.float16].index(args.q.dtype), ROUTES[route]
        return call


class Kernels:
    """The C interface of a compiled library, on tensors of a processor."""

    def __init__(self, path: Path) -> None:
        self.session = Session(path)
        self.library = self.session.library

    def __call__(
        self,
        args: AttentionArgs,
        route: str,
        mode: Mode = Mode.LATE,
        seed: int = 0,
        multiprocessors: int = 4,
        wgmma_mode: Mode = Mode.LATE,
        capability: int = 90,
    ) -> tuple[Tensor, Tensor]:
        """``o`` and ``lse``; what the emulator has against the launches is in ``session.errors``."""
        B, H, S, _ = args.q.shape
        o = args.q.new_full((B, S, H, args.v.shape[3]), float("nan")).transpose(1, 2)
        lse = torch.full((B, H, S), float("nan"))
        sinks = None if args.sinks is None else args.sinks.float().contiguous()
        call = ctypes.byref(Call.of(args, o, lse, sinks, route))
        self.session.reset(
            mode=mode, seed=seed, multiprocessors=multiprocessors, wgmma_mode=wgmma_mode, capability=capability
        )
        if route == "fused":
            run = self.library.fastprefix_fused
            run.restype, run.argtypes = ctypes.c_char_p, [ctypes.c_void_p] * 2
            error = run(call, None)
        else:
            size = self.library.fastprefix_decode_workspace
            size.restype, size.argtypes = ctypes.c_int64, [ctypes.c_void_p]
            workspace = torch.full((size(call) // 4,), float("nan"))
            run = self.library.fastprefix_decode
            run.restype, run.argtypes = ctypes.c_char_p, [ctypes.c_void_p] * 3
            error = run(call, workspace.data_ptr(), None)
        assert error is None or self.session.errors, error
        return o, lse


@functools.cache
def kernels() -> Kernels:
    """All of them, as they are."""
    others = [ROOT / f"tests/cuda/emulated/{name}.cpp" for name in ("backward", "sm80")]
    return Kernels(library("tests/cuda/emulated/kernels.cpp", sources=others))
