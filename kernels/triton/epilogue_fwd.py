"""A short prefix after a vendor kernel: attend to it and merge, in place, into the content's ``o`` and ``lse``.

One pass over memory: q, o and lse are read once, o and lse written once; the prefix stays in the cache.
"""

import triton
import triton.language as tl

from .flat_rows import flat_rows
from .kernel_structs import Order
from .prefix_attn_fwd import attend_prefix
from .primitives import (
    LOG2E,
    NO_ID,
    load_rows,
    log_sum_exp,
    next_prefix,
    prefix_length,
    row_prefixes,
    store_rows,
)


@triton.jit(do_not_specialize=["B", "S", "P", "H_kv"])
def _prefix_attn_epilogue_fwd_kernel(
    q,  # Strided [B, H, S, D]
    prefix_k, prefix_v,  # Strided [N, H_kv, P, D]
    o,  # Strided [B, H, S, D_v]: the content's, then the merged one
    lse,  # fp32 [B, H, S], likewise; -inf where a row saw no content, and any finite o there
    prefix_lse,  # fp32 [B, H, S], or None
    sinks,  # [H], or None
    bank,  # its ids_s is 0 where samples have one prefix each
    scale, softcap, B, S, P, H_kv,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of the batch's rows. Grid: ``cdiv(B * S * G, BLOCK_M) * H_kv``, neighbours in memory side by side."""
    h_kv = tl.program_id(0) % H_kv
    first = tl.program_id(0) // H_kv * BLOCK_M
    b, s, g, row = flat_rows(Order(None, None), 0, first, B, S, G, False, BLOCK_M)
    h = h_kv * G + g
    place = (b.to(tl.int64) * H_kv * G + h) * S + s
    # All loads are under way before the first product waits for one.
    q_tile = load_rows(q, b, h, s, row, D, BLOCK_D)
    content_o = load_rows(o, b, h, s, row, D_V, BLOCK_DV)
    content = tl.load(lse + place, mask=row, other=float("-inf")) * LOG2E

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if bank.ids is None:
        m_i, l_i, acc = attend_prefix(m_i, l_i, acc, q_tile, prefix_k, prefix_v, bank, tl.zeros_like(h_kv), h_kv, P,
                                      None, scale, softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV, False)  # fmt: skip
    else:
        ids = row_prefixes(bank, b, s, row)
        n = next_prefix(ids, -1)
        while n != NO_ID:
            length = prefix_length(bank, n, P)
            m_i, l_i, acc = attend_prefix(m_i, l_i, acc, q_tile, prefix_k, prefix_v, bank, n, h_kv, length, ids, scale,
                                          softcap, D, D_V, BLOCK_P, BLOCK_D, BLOCK_DV, False)  # fmt: skip
            n = next_prefix(ids, n)
    if prefix_lse is not None:
        tl.store(prefix_lse + place, log_sum_exp(m_i, l_i), mask=row)

    m = tl.maximum(m_i, content)
    if sinks is not None:
        # A part with o = 0. Its base-2 logit must not overflow to "nothing at all".
        sink = tl.load(sinks + h, mask=row, other=0.0).to(tl.float32)
        sink_2 = tl.where(sink == float("-inf"), sink, tl.maximum(sink, -2e38) * LOG2E)
        seen = m
        m = tl.maximum(m, sink_2)
    # A row that sees nothing at all keeps m = -inf; shifting by 0 there leaves weight 0 instead of nan.
    shift = tl.where(m == float("-inf"), 0.0, m)
    prefix_weight = tl.exp2(m_i - shift)
    content_weight = tl.exp2(content - shift)
    l_i = l_i * prefix_weight + content_weight
    if sinks is not None:
        l_i += tl.exp2(sink_2 - shift)
        total = tl.where(seen == float("-inf"), sink, log_sum_exp(m, l_i))
    else:
        total = log_sum_exp(m, l_i)
    norm = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
    merged = acc * (prefix_weight * norm)[:, None] + content_o.to(tl.float32) * (content_weight * norm)[:, None]
    store_rows(o, b, h, s, row, merged, D_V, BLOCK_DV)
    tl.store(lse + place, total, mask=row)
