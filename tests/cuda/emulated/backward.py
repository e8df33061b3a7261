"""The backward's kernels in the emulator, called as C++ calls them, and judged by the error rule."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastprefix import reference
from fastprefix.types import AttentionArgs, Needs
from tests.cuda.emulated.calls import Call, Rows, kernels
from tests.cuda.emulated.random_calls import in_fp64
from tests.emulator.session import Mode, Session

ALL = Needs(True, True, True, True, True, prefix_bias=True)


class BackwardCall(ctypes.Structure):
    """``BackwardCall`` of kernels/cuda/backward_call.h."""

    _fields_ = [
        ("forward", Call),
        *((name, Rows) for name in ("dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dprefix_k", "dprefix_v", "dprefix_bias")),
    ]


class Problem:
    """A call, the gradient of its output, and what the fp64 reference makes of them."""

    def __init__(self, args: AttentionArgs) -> None:
        self.args, exact = args, in_fp64(args)
        o, lse = reference.fwd(exact)
        generator = torch.Generator().manual_seed(o.numel())
        self.do = torch.randn(o.shape, generator=generator).to(args.q.dtype)
        self.o, self.lse = o.to(args.q.dtype), lse.float()
        self.truth = reference.bwd(exact, o, lse, self.do.double(), ALL)

    def assert_right(self, found: Sequence[Tensor | None], needs: Needs) -> None:
        """Twice the error of the reference in the same dtype; what is not needed is not written."""
        peer = reference.bwd(self.args, self.o, self.lse, self.do, ALL)
        eps, rows = torch.finfo(self.args.q.dtype).eps, self.lse.numel()
        for name, x, want, other, need in zip(Needs._fields, found, self.truth, peer, needs):
            if x is None:
                assert want is None
                continue
            assert want is not None and other is not None
            if not need or not want.numel():
                assert x.isnan().all(), f"d{name} was written"
                continue
            error, allowed = ((y.double() - want).abs().max().item() for y in (x, other))
            # Sums over all rows are rounded like a random walk.
            floor = eps * want.abs().max().item() * (max(1.0, 0.1 * rows**0.5) if "prefix" in name else 1.0) + 1e-6
            assert error <= 2 * allowed + floor, (f"d{name}", error, allowed)


class Backward:
    """``fastprefix_backward`` of a compiled library."""

    def __init__(self, path: Path) -> None:
        self.session = Session(path)
        self.run = self.session.library.fastprefix_backward
        self.run.restype, self.run.argtypes = ctypes.c_char_p, [ctypes.c_void_p] * 3
        self.room = self.session.library.fastprefix_backward_workspace
        self.room.restype, self.room.argtypes = ctypes.c_int64, [ctypes.c_void_p]

    def __call__(
        self,
        problem: Problem,
        needs: Needs = ALL,
        mode: Mode = Mode.LATE,
        seed: int = 0,
        multiprocessors: int = 4,
        wgmma_mode: Mode = Mode.LATE,
        capability: int = 90,
    ) -> list[Tensor | None]:
        """The gradients, nan where they are not needed, None of a bias that is not there; the prefix's in fp32."""
        args = problem.args
        (B, H, S, D), T, D_v = args.q.shape, args.k.shape[2], args.v.shape[3]

        def empty(heads: int, rows: int, width: int) -> Tensor:
            return args.q.new_full((B, rows, heads, width), float("nan")).transpose(1, 2)

        found: list[Tensor | None] = [empty(H, S, D), *(empty(args.k.shape[1], T, width) for width in (D, D_v))]
        of_prefix = (args.prefix_k, args.prefix_v, args.bias, args.prefix_bias)
        found += [None if x is None else torch.full(x.shape, float("nan")) for x in of_prefix]
        call = BackwardCall(Call.of(args, problem.o, problem.lse, None, "fused"), Rows.of(problem.do))
        for name, x, need in zip(Needs._fields, found, needs):
            if need and x is not None and x.numel():
                setattr(call, f"d{name}", x.data_ptr() if "prefix" in name else Rows.of(x))
        self.session.reset(
            mode=mode, seed=seed, multiprocessors=multiprocessors, wgmma_mode=wgmma_mode, capability=capability
        )
        workspace = torch.full((self.room(ctypes.byref(call)) // 4,), float("nan"))
        error = self.run(ctypes.byref(call), workspace.data_ptr(), None)
        assert error is None or self.session.errors, error
        return found


@functools.cache
def backward() -> Backward:
    """All of its kernels, as they are."""
    return Backward(Path(kernels().library._name))
