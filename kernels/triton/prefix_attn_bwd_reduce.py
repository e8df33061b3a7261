"""Second stage of the prefix's gradients: sum the partials of all splits, in order, in fp32."""

import triton
import triton.language as tl


@triton.jit
def sum_splits(partial, out, splits, size, BLOCK: tl.constexpr):
    """``out [size] = sum_i partial [i, size]``, in the output's dtype."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = i < size
    total = tl.zeros([BLOCK], tl.float32)
    where = partial + i
    for _ in range(splits):
        total += tl.load(where, mask=keep, other=0.0)
        where += size
    tl.store(out + i, total.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["splits"])
def _prefix_attn_bwd_reduce_kernel(
    partial_k, partial_v, partial_bias,  # fp32 [splits, size], or None
    dprefix_k, dprefix_v, dprefix_bias,  # [size], contiguous, in the tensor's own dtype, or None
    splits, size_k, size_v, size_bias, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: ``cdiv(max(size_k, size_v, size_bias), BLOCK)``."""
    if partial_k is not None:
        sum_splits(partial_k, dprefix_k, splits, size_k, BLOCK)
    if partial_v is not None:
        sum_splits(partial_v, dprefix_v, splits, size_v, BLOCK)
    if partial_bias is not None:
        sum_splits(partial_bias, dprefix_bias, splits, size_bias, BLOCK)
