"""Checks the shapes, dtypes and devices of the operator's arguments; every error names the argument."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from .errors import fail

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
INFINITY = float("inf")
FARTHEST = 2**62  # the largest position, so that the sum or difference of two fits int64


def is_int(x: object) -> TypeGuard[int]:
    """Whether ``x`` is an int; True and False are not."""
    return isinstance(x, int) and not isinstance(x, bool)


def _tensor(name: str, x: object, dims: str, rank: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if not isinstance(x, Tensor):
        raise fail(name, type(x).__name__, f"a tensor {dims}")
    if x.layout != torch.strided:
        raise fail(name, f"layout {x.layout}", f"a dense tensor {dims}")
    if x.dim() not in rank:
        raise fail(name, f"shape {list(x.shape)}", dims)
    if x.dtype not in dtypes:
        raise fail(name, f"dtype {x.dtype}", " or ".join(str(d) for d in dtypes))
    return x


def _sizes(want: list[int | None]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in want)}]"


def _shape(name: str, x: Tensor, dims: str, want: list[int | None]) -> None:
    """Raise ValueError unless ``x`` has the sizes in ``want``, in which None allows any size."""
    for have, need in zip(x.shape, want, strict=True):
        if need is not None and have != need:
            raise fail(name, f"shape {list(x.shape)}", f"{dims} = {_sizes(want)}")


def check_content(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q, k and v fit each other."""
    _tensor("q", q, "[B, H, S, D]", (4,), FLOATS)
    _tensor("k", k, "[B, H_kv, T, D]", (4,), FLOATS)
    _tensor("v", v, "[B, H_kv, T, D_v]", (4,), FLOATS)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise fail(name, f"dtype {x.dtype}", f"q's dtype {q.dtype}")
        if x.device != q.device:
            raise fail(name, f"device {x.device}", f"q's device {q.device}")
    _shape("k", k, "[B, H_kv, T, D]", [q.shape[0], None, None, q.shape[3]])
    if q.shape[1] == 0:
        raise fail("q", f"shape {list(q.shape)}", "at least one head")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise fail("k", f"{k.shape[1]} heads", f"a number that divides q's {q.shape[1]} heads")
    if q.shape[3] == 0 or v.shape[3] == 0:
        name, x = ("q", q) if q.shape[3] == 0 else ("v", v)
        raise fail(name, f"shape {list(x.shape)}", "a head dim of at least 1")
    _shape("v", v, "[B, H_kv, T, D_v]", [q.shape[0], k.shape[1], k.shape[2], None])


def check_prefix(
    q: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_ids: object, prefix_lens: object
) -> None:
    """Check that the prefix fits q and v; its dtype may differ. With ``prefix_ids`` it is a bank, packed if 3-D."""
    bank = prefix_ids is not None
    packed = bank and prefix_lens is not None and isinstance(prefix_k, Tensor) and prefix_k.dim() == 3
    bank = bank and not packed
    lead, rank = ("[N, H_kv, P, ", 4) if bank else ("[H_kv, P, ", 3)
    if packed:
        hint = " (a packed bank: P is the sum of prefix_lens)"
    elif bank:
        hint = " (a bank; packed, [H_kv, P, D] with P the sum of its lengths, it needs prefix_lens)"
    else:
        hint = " (a bank [N, H_kv, P, D] needs prefix_ids)"
    _tensor("prefix_k", prefix_k, f"{lead}D]{hint}", (rank,), FLOATS)
    _tensor("prefix_v", prefix_v, f"{lead}D_v]{hint}", (rank,), FLOATS)
    if prefix_v.dtype != prefix_k.dtype:
        raise fail("prefix_v", f"dtype {prefix_v.dtype}", f"prefix_k's dtype {prefix_k.dtype}")
    for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x.device != q.device:
            raise fail(name, f"device {x.device}", f"q's device {q.device}")
    free: list[int | None] = [None] if bank else []
    _shape("prefix_k", prefix_k, f"{lead}D]", [*free, v.shape[1], None, q.shape[3]])
    lead_v = [prefix_k.shape[0]] if bank else []
    _shape("prefix_v", prefix_v, f"{lead}D_v]", [*lead_v, v.shape[1], prefix_k.shape[-2], v.shape[3]])
    if bank and prefix_k.shape[0] == 0:
        raise fail("prefix_k", f"shape {list(prefix_k.shape)}", "a bank of at least one prefix")


def _optional(q: Tensor, name: str, x: object, dims: str, want: list[int | None], dtypes: Any) -> None:
    if x is None:
        return
    t = _tensor(name, x, f"{dims} = {_sizes(want)}", (len(want),), dtypes)
    _shape(name, t, dims, want)
    if t.device != q.device:
        raise fail(name, f"device {t.device}", f"q's device {q.device}")


def check_masks(
    q: Tensor, k: Tensor, causal: bool, key_padding_mask: object, segment_ids: object, q_start: object, window: object
) -> None:
    """Check all arguments that hide content keys."""
    check_flag("causal", causal)
    batch, keys = q.shape[0], k.shape[2]
    _optional(q, "key_padding_mask", key_padding_mask, "[B, T]", [batch, keys], (torch.bool,))
    _optional(q, "segment_ids", segment_ids, "[B, T]", [batch, keys], INTS)
    if isinstance(q_start, Tensor):
        if q_start.dim() == 0:
            _optional(q, "q_start", q_start, "[]", [], INTS)
        else:
            _optional(q, "q_start", q_start, "[B]", [batch], INTS)
    elif q_start is not None and (isinstance(q_start, bool) or not isinstance(q_start, (int, torch.SymInt))):
        raise fail("q_start", type(q_start).__name__, "an int, an int tensor [] or [B], or None")
    for name, number in (("q_start", q_start), ("window", window)):
        if isinstance(number, int) and abs(number) > FARTHEST:
            raise fail(name, number, f"within {-FARTHEST}..{FARTHEST}")
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)) or window < 1:
        raise fail("window", repr(window), "an int of at least 1, or None")
    if not causal:
        raise fail(
            "window", "a window with causal=False", "causal=True (a row sees the last `window` keys up to itself)"
        )


def check_extras(q: Tensor, k: Tensor, sinks: object, bias: object, gate: object, softcap: object) -> None:
    """Check the arguments that change scores or the merge of prefix and content: sinks, bias, gate, softcap."""
    batch, heads, seq, keys = *q.shape[:3], k.shape[2]
    _optional(q, "sinks", sinks, "[H]", [heads], FLOATS)
    if isinstance(gate, Tensor) and gate.dim() == 2:
        _optional(q, "gate", gate, "[B, H]", [batch, heads], FLOATS)
    else:
        _optional(q, "gate", gate, "[H] or [B, H]", [heads], FLOATS)
    if bias is not None:
        dims = f"a tensor broadcastable to [B, H, S, T] = {[batch, heads, seq, keys]}"
        b = _tensor("bias", bias, dims, (0, 1, 2, 3, 4), (*FLOATS, torch.bool))
        for have, need in zip(reversed(b.shape), (keys, seq, heads, batch), strict=False):
            if have not in (1, need):
                raise fail("bias", f"shape {list(b.shape)}", dims)
        if b.device != q.device:
            raise fail("bias", f"device {b.device}", f"q's device {q.device}")
    if softcap is not None and not (_is_number(softcap) and softcap > 0):
        raise fail("softcap", repr(softcap), "a positive finite number, or None")


def check_bank(q: Tensor, prefix_k: Tensor, prefix_ids: object, prefix_lens: object) -> None:
    """Check that ids are rows of the bank, on the CPU only: reading values on another device would synchronise."""
    if prefix_ids is None:
        if prefix_lens is not None:
            raise fail("prefix_lens", "lengths without prefix_ids", "prefix_ids, which make a bank of the prefix")
        return
    batch, seq = q.shape[0], q.shape[2]
    packed = prefix_k.dim() == 3
    per_row = isinstance(prefix_ids, Tensor) and prefix_ids.dim() == 2
    dims, want = ("[B, S]", [batch, seq]) if per_row else ("[B] or [B, S]", [batch])
    _optional(q, "prefix_ids", prefix_ids, dims, list(want), INTS)
    _optional(q, "prefix_lens", prefix_lens, "[N]", [None if packed else prefix_k.shape[0]], INTS)
    number = prefix_k.shape[0]
    if packed:
        assert isinstance(prefix_lens, Tensor)
        number = prefix_lens.shape[0]
        if number == 0:
            raise fail("prefix_lens", "no length", "a bank of at least one prefix")
    if torch.compiler.is_compiling() or q.device.type != "cpu":
        return
    assert isinstance(prefix_ids, Tensor)
    if prefix_ids.numel():
        low, high = (int(x) for x in prefix_ids.aminmax())
        if low < -1 or high >= number:
            raise fail("prefix_ids", f"{low}..{high}", f"-1..{number - 1}")
    if isinstance(prefix_lens, Tensor):
        lens, tokens = prefix_lens.tolist(), prefix_k.shape[-2]
        if packed and (min(lens) < 0 or sum(lens) != tokens):
            raise fail("prefix_lens", lens, f"lengths of 0 and more that add up to prefix_k's {tokens} tokens")
        if min(lens) < 0 or max(lens) > tokens:
            raise fail("prefix_lens", lens, f"lengths within 0..{tokens}")


def check_prefix_bias(q: Tensor, prefix_k: Tensor, prefix_bias: object) -> None:
    """Check that there is one number for each key/value head and token of the prefix, or of the bank."""
    dims = "[N, H_kv, P]" if prefix_k.dim() == 4 else "[H_kv, P]"
    _optional(q, "prefix_bias", prefix_bias, dims, list(prefix_k.shape[:-1]), FLOATS)


def _is_number(x: object) -> TypeGuard[float]:
    # A comparison instead of math.isfinite, as torch.compile may have made the number symbolic.
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -INFINITY < x < INFINITY


def check_flag(name: str, x: object) -> None:
    """Raise ValueError unless ``x`` is a plain bool."""
    if not isinstance(x, bool):
        raise fail(name, repr(x), "True or False")


def check_scalars(scale: object, dropout_p: object) -> None:
    """Raise ValueError unless ``scale`` and ``dropout_p`` are plain numbers in their ranges."""
    if scale is not None and not _is_number(scale):
        raise fail("scale", repr(scale), "a finite number, or None for 1 / sqrt(D)")
    if not _is_number(dropout_p) or not 0.0 <= dropout_p < 1.0:
        raise fail("dropout_p", repr(dropout_p), "a probability in [0, 1)")
