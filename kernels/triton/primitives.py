"""The algebra that all kernels share. Logits are base 2: log2(e) is folded into the scale.

Query rows are packed: row ``r`` of a key/value head is token ``r // G`` and the group's head ``r % G``, so that a
tile of keys is read once for the whole group. Index operands are broadcast by the caller, ``[M, 1]`` for rows and
``[1, N]`` for keys or the other way round, so that a kernel may hold its scores transposed.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED_BIAS = tl.constexpr(-1e37)
NO_ID = tl.constexpr(2147483647)


@triton.jit
def dot(a, b, acc=None):
    """``a @ b (+ acc)`` in fp32; fp32 operands on tensor cores by the three-fold split of tf32."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def packed_rows(first, S, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Token, head in the group, and whether there is such a row: ``[BLOCK_M]`` each."""
    r = first + tl.arange(0, BLOCK_M)
    return r // G, r % G, r < S * G


@triton.jit
def offsets(x, b, h, s):
    """Element offset of each row of a Strided, int64."""
    return b.to(tl.int64) * x.b + h.to(tl.int64) * x.h + s.to(tl.int64) * x.s


@triton.jit
def load_rows(x, b, h, s, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK_M, BLOCK_D]``, 0 outside."""
    d = tl.arange(0, BLOCK_D)
    keep = valid[:, None]
    if D != BLOCK_D:
        keep = keep & (d < D)[None, :]
    return tl.load(x.ptr + offsets(x, b, h, s)[:, None] + d[None, :] * x.d, mask=keep, other=0.0)


@triton.jit
def store_rows(x, b, h, s, valid, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write ``[BLOCK_M, BLOCK_D]`` in the tensor's dtype."""
    d = tl.arange(0, BLOCK_D)
    keep = valid[:, None]
    if D != BLOCK_D:
        keep = keep & (d < D)[None, :]
    pointers = x.ptr + offsets(x, b, h, s)[:, None] + d[None, :] * x.d
    tl.store(pointers, value.to(x.ptr.dtype.element_ty), mask=keep)


@triton.jit
def load_packed(x, b, h_kv, first, S, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                TMA: tl.constexpr):  # fmt: skip
    """Packed rows from ``first`` on, ``[BLOCK_M, BLOCK_D]``; the descriptor's box is ``[1, BLOCK_M // G, G, BLOCK_D]``
    of ``[B, S, H, D]``.
    """
    if TMA:
        return x.load([b, first // G, h_kv * G, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        s, g, valid = packed_rows(first, S, G, BLOCK_M)
        return load_rows(x, b, h_kv * G + g, s, valid, D, BLOCK_D)


@triton.jit
def load_keys(x, b, h, first, end, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """Keys or values ``first`` to ``end`` of one head, ``[BLOCK_N, BLOCK_D]``, 0 outside; the descriptor's box is
    ``[1, 1, BLOCK_N, BLOCK_D]``.
    """
    if TMA:
        return x.load([b, h, first, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        n = first + tl.arange(0, BLOCK_N)
        return load_rows(x, b, h, n, n < end, D, BLOCK_D)


@triton.jit
def query_start(mask, q_start, b):
    """Content position of a sample's first query row."""
    if mask.q_start is None:
        return q_start
    else:
        return tl.load(mask.q_start + b * mask.q_start_b).to(tl.int32)


@triton.jit
def prefix_length(bank, n, P):
    """Tokens of prefix ``n``; 0 for -1."""
    length = P
    if bank.lens is not None:
        length = tl.load(bank.lens + tl.maximum(n, 0)).to(tl.int32)
    if bank.ids is not None:
        length = tl.where(n < 0, 0, length)
    return length


@triton.jit
def sample_prefix(bank, b):
    """The prefix of a sample, where a sample has one."""
    if bank.ids is None:
        return b * 0
    else:
        return tl.load(bank.ids + b.to(tl.int64) * bank.ids_b).to(tl.int32)


@triton.jit
def row_prefixes(bank, b, s, valid):
    """The prefix of each row, where rows differ; -1 for none and outside."""
    where = b.to(tl.int64) * bank.ids_b + s.to(tl.int64) * bank.ids_s
    return tl.load(bank.ids + where, mask=valid, other=-1).to(tl.int32)


@triton.jit
def next_prefix(ids, after):
    """The smallest id above ``after``, NO_ID when there is none: rows of a tile mostly share one or two."""
    return tl.min(tl.where(ids > after, ids, NO_ID), 0)


@triton.jit
def tanh(x):
    """By exp2, which the hardware has; exact at both ends."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def logits(raw, scale, softcap):
    """Base-2 logits of raw products."""
    if softcap is None:
        return raw * (scale * LOG2E)
    else:
        return tanh(raw * (scale / softcap)) * (softcap * LOG2E)


@triton.jit
def through_softcap(ds, raw, scale, softcap):
    """Chain rule of :func:`logits`, without its scale: ``d tanh(y) = 1 - tanh(y)^2``."""
    if softcap is None:
        return ds
    else:
        t = tanh(raw * (scale / softcap))
        return ds * (1.0 - t * t)


@triton.jit
def visible(x, b, h, s, row, key, pos, T, mask, CAUSAL: tl.constexpr):
    """Content logits ``x`` with their bias, -inf where hidden. ``row``: which rows exist; ``pos``: where."""
    keep = key < T
    inside = keep
    if CAUSAL:
        keep = keep & (key <= pos)
    if mask.window is not None:
        keep = keep & (key > pos - mask.window)
    if mask.padding is not None:
        seen = tl.load(mask.padding + b.to(tl.int64) * mask.padding_b + key * mask.padding_t, mask=inside, other=0)
        keep = keep & (seen != 0)
    if mask.segments is not None:
        base = mask.segments + b.to(tl.int64) * mask.segments_b
        own = tl.load(base + tl.minimum(tl.maximum(pos, 0), T - 1) * mask.segments_t, mask=row, other=0)
        keep = keep & (own == tl.load(base + key * mask.segments_t, mask=inside, other=0))
    if mask.bias is not None:
        rows = b.to(tl.int64) * mask.bias_b + h.to(tl.int64) * mask.bias_h + s.to(tl.int64) * mask.bias_s
        bias = tl.load(mask.bias + rows + key.to(tl.int64) * mask.bias_t, mask=inside & row, other=0)
        if mask.bias.dtype.element_ty == tl.uint8:
            keep = keep & (bias != 0)
        else:
            bias = bias.to(tl.float32)
            keep = keep & (bias > MASKED_BIAS)
            x = x + tl.where(bias > MASKED_BIAS, bias, 0.0) * LOG2E
    return tl.where(keep, x, float("-inf"))


@triton.jit
def biased(x, bank, n, h_kv, token, inside):
    """Logits ``x`` of a prefix's tokens, ``[1, N]`` or ``[N, 1]``, with their bias; -inf where that hides one."""
    if bank.bias is None:
        return x
    else:
        bias = tl.load(bank.bias + n.to(tl.int64) * bank.bias_n + h_kv * bank.bias_h + token, mask=inside, other=0.0)
        return tl.where(bias > MASKED_BIAS, x + bias * LOG2E, float("-inf"))


@triton.jit
def key_range(first, last, T, window, CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of rows at positions ``first`` to ``last``: keys ``[low, full)`` need no mask, ``[full, high)`` one."""
    low = 0
    full = T
    high = T
    if CAUSAL:
        full = tl.minimum(T, tl.maximum(first + 1, 0))
        high = tl.minimum(T, tl.maximum(last + 1, 0))
    if window is not None:
        low = tl.maximum(0, first - window + 1) // BLOCK_N * BLOCK_N
    if MASKED:
        full = low
    else:
        full = full // BLOCK_N * BLOCK_N
    return low, full, high


@triton.jit
def segment_range(low, high, shift, least, most, b, T, mask):
    """The part of ``[low, high)`` outside which no position ``i + shift`` is in segments ``least`` to ``most``: rows of
    a packed document walk its keys only. Ids need not be sorted, for they are compared, not searched.
    """
    base = mask.segments + b.to(tl.int64) * mask.segments_b
    first = high
    last = low
    for start in range(low, high, 1024):
        i = start + tl.arange(0, 1024)
        position = tl.minimum(tl.maximum(i + shift, 0), T - 1)
        ids = tl.load(base + position * mask.segments_t, mask=i < high, other=0)
        hit = (i < high) & (ids >= least) & (ids <= most)
        first = tl.minimum(first, tl.min(tl.where(hit, i, high), 0))
        last = tl.maximum(last, tl.max(tl.where(hit, i + 1, low), 0))
    return first, tl.maximum(first, last)


@triton.jit
def segment_ids(position, valid, b, T, mask):
    """Least and most of the segments at these positions, or a range around them."""
    base = mask.segments + b.to(tl.int64) * mask.segments_b
    inside = tl.minimum(tl.maximum(position, 0), T - 1)
    ids = tl.load(base + inside * mask.segments_t, mask=valid & (inside >= 0), other=0)
    return tl.min(tl.where(valid, ids, NO_ID), 0), tl.max(tl.where(valid, ids, -NO_ID), 0)


@triton.jit
def online_softmax(m_i, l_i, acc, x, scale, v):
    """One tile of the running softmax: base-2 logits ``x * scale`` (scale >= 0), values ``v``."""
    m = tl.maximum(m_i, tl.max(x, 1) * scale)
    # A row that has seen nothing yet keeps m = -inf; shifting by 0 there leaves weight 0 instead of nan.
    shift = tl.where(m == float("-inf"), 0.0, m)
    p = tl.exp2(x * scale - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return m, l_i, acc


@triton.jit
def log_sum_exp(m_i, l_i):
    """Natural log-sum-exp of a running softmax, -inf of nothing."""
    return (m_i + tl.log2(tl.where(l_i == 0.0, 1.0, l_i))) * LN2


@triton.jit
def load_lse(lse, where, valid):
    """Base-2 log-sum-exp for the backward, +inf (every weight 0) where a row saw nothing, or nothing but a sink as low
    as a mask, or is none.
    """
    x = tl.load(lse + where, mask=valid, other=float("-inf"))
    return tl.where(x <= MASKED_BIAS, float("inf"), x * LOG2E)
