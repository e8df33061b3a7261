"""Query rows of the whole batch, flattened: the prefix, which has no batch, is multiplied with all of them.

A prefix's rows are its units in turn, each unit's tokens, each token's query heads of the group:
``r = (unit * tokens + token) * G + g``. A unit is a sample (``S`` tokens) or, where rows have prefixes of their own,
a token. Without an :class:`~.kernel_structs.Order` there is one prefix, and unit ``i`` is sample ``i``.
"""

import triton
import triton.language as tl


@triton.jit
def count_rows(order, n, B, S, G: tl.constexpr, UNIT_IS_TOKEN: tl.constexpr):
    """How many rows read prefix ``n``; all of them without an order."""
    if order.units is None:
        return B * S * G
    else:
        units = tl.load(order.first + n + 1) - tl.load(order.first + n)
        if UNIT_IS_TOKEN:
            return units.to(tl.int32) * G
        else:
            return units.to(tl.int32) * S * G


@triton.jit
def flat_rows(order, n, first, B, S, G: tl.constexpr, UNIT_IS_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr,
              AGAIN: tl.constexpr = False):  # fmt: skip
    """Sample, token, head in the group, and whether there is such a row: ``[BLOCK_M]`` each, from row ``first`` of
    prefix ``n`` on. Sample and token are 0 where there is none.

    ``AGAIN``: read the order a second time (a volatile load). Otherwise its values would stay in registers through the
    loop over keys, which comes between loading rows and storing them.
    """
    r = first + tl.arange(0, BLOCK_M)
    valid = r < count_rows(order, n, B, S, G, UNIT_IS_TOKEN)
    token = tl.where(valid, r // G, 0)  # of this prefix
    if order.units is None:
        b = token // S
        s = token % S
    else:
        units = order.units + tl.load(order.first + n)
        if UNIT_IS_TOKEN:
            unit = tl.load(units + token, mask=valid, other=0, volatile=AGAIN).to(tl.int32)
            b = unit // S
            s = unit % S
        else:
            b = tl.load(units + token // S, mask=valid, other=0, volatile=AGAIN).to(tl.int32)
            s = token % S
    return b, s, r % G, valid
