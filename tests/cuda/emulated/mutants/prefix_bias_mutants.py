"""Faults of a bias on the prefix's scores, in code that the kernels of all devices share: the numbers are wrong."""

from __future__ import annotations

from tests.cuda.emulated.mutants.mutant import Mutant

ROWS, MASKS = (f"forward/{name}.cuh" for name in ("rows", "visible"))
ROW_BLOCK, KEY_BLOCK = (f"backward/{name}.cuh" for name in ("row_block", "key_block"))

OF_ROWS = [
    Mutant(
        "the last tile has no bias",
        MASKS,
        "if (me.c.prefix_bias) add_bias",
        "if (me.c.prefix_bias && first + 2 * ELEMENTS <= keys) add_bias",
        "",
        "bias",
    ),
    Mutant(
        "the bias of another head", MASKS, "tokens_before(me.c, n), me.t.h_kv", "tokens_before(me.c, n), 0", "", "bias"
    ),
    Mutant("a bias behind the end is read", MASKS, "j * 8 + e < left ? bias_at", "true ? bias_at", "outside", "bias"),
]

FORWARD_BIAS_MUTANTS = [
    *OF_ROWS,
    Mutant(
        "the scale is of the bias, too",
        ROWS,
        "&& c.scale != 0.0f && !c.prefix_bias ?",
        "&& c.scale != 0.0f ?",
        "",
        "bias",
    ),
]

BACKWARD_BIAS_MUTANTS = [
    Mutant(
        "the bias's gradient is scaled",
        KEY_BLOCK,
        "dk[e] *= c.scale;\n",
        "dk[e] *= c.scale;\n    FP_UNROLL for (int half = 0; half < 2; half++) dbias[half] *= c.scale;\n",
        "",
        "bias",
    ),
    Mutant(
        "the bias's gradient is that through the cap",
        KEY_BLOCK,
        "dbias[row_of(e)] += x[e] * ds;",
        "dbias[row_of(e)] += x[e] * dp[e];",
        "",
        "bias",
    ),
    Mutant(
        "one lane's sums are those of four",
        KEY_BLOCK,
        "      dbias[half] += shfl_xor(dbias[half], 2);\n",
        "",
        "",
        "bias",
    ),
    Mutant(
        "the cap's slope is of a score with its bias",
        ROW_BLOCK,
        "    dp[e] = through_cap(dp[e] - row[row_of(e)].x[1], x[e], me.cap);\n  }\n  hide(x);\n",
        "  }\n  hide(x);\n  for (int e = 0; e < ELEMENTS; e++)\n"
        "    dp[e] = through_cap(dp[e] - row[row_of(e)].x[1], x[e], me.cap);\n",
        "",
        "bias",
    ),
    *OF_ROWS,
    Mutant("the bias of keys is another head's", KEY_BLOCK, "(t.token), t.h_kv);", "(t.token), 0);", "", "bias"),
]


def without_weight(kernel: str) -> Mutant:
    """Rows that do not exist have a weight, which a large bias makes infinite, and infinity times 0 is nan."""
    return Mutant(
        "rows that do not exist", kernel, "found{{-NEGATIVE_INFINITY, 0.0f}}", "found{{0.0f, 0.0f}}", "", "bias"
    )
