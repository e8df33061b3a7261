"""Faults of the backward for sm_90a: those of every barrier, fence and wait, and of every layout."""

from __future__ import annotations

from tests.cuda.emulated.mutants.mutant import Mutant
from tests.cuda.emulated.mutants.prefix_bias_mutants import BACKWARD_BIAS_MUTANTS, without_weight

ROWS, KEYS, BLOCK, LAUNCHES = (f"backward/{name}.cuh" for name in ("rows", "keys", "key_block", "launches"))
BANK = "decode/bank.cuh"
RACE = "race|in flight|nothing wrote|without a barrier"
FENCE = "        fence_proxy_async();   // wgmma reads by another proxy than these threads write\n"


def of_both(name: str, old: str, new: str, says: str, call: str = "long") -> list[Mutant]:
    """The same fault in the kernel of rows and in that of keys."""
    return [
        Mutant(f"{name} ({kernel})", file, old, new, says, call) for kernel, file in (("rows", ROWS), ("keys", KEYS))
    ]


BACKWARD_MUTANTS = [
    *of_both(
        "no wait for a stage to be empty", "        mbarrier_wait(empty(stage), ((step / STAGES) & 1) ^ 1);\n", "", RACE
    ),
    *of_both("no wait for the copies", "        cp_async_wait_group<1>();\n", "", "in flight"),
    *of_both("no proxy fence after the copies", FENCE, "", "fence"),
    *of_both(
        "q or k is not waited for",
        "      cp_async_commit_group();\n      cp_async_wait_group<0>();\n      fence_proxy_async();\n",
        "      cp_async_commit_group();\n      fence_proxy_async();\n",
        "in flight",
    ),
    Mutant(
        "no proxy fence after q and do",
        ROWS,
        "      cp_async_wait_group<0>();\n      fence_proxy_async();\n    }\n",
        "      cp_async_wait_group<0>();\n    }\n",
        "fence",
        "long",
    ),
    Mutant("keys are not waited for", ROWS, "    mbarrier_wait(full(stage), number / STAGES & 1);\n", "", RACE, "long"),
    Mutant("rows are not waited for", KEYS, "      mbarrier_wait(full(stage), step / STAGES & 1);\n", "", RACE, "long"),
    Mutant(
        "scores are read before they are there",
        ROWS,
        "    wgmma_commit_group();\n    wgmma_wait_group<0>();\n    pin(x);\n",
        "    wgmma_commit_group();\n    pin(x);\n",
        "while its wgmma|in flight",
        "long",
    ),
    Mutant(
        "scores by keys are read before they are there",
        KEYS,
        "      wgmma_wait_group<0>();\n      pin(x);\n",
        "      pin(x);\n",
        "while its wgmma|in flight",
        "long",
    ),
    Mutant(
        "a stage is released while it is multiplied",
        ROWS,
        "    wgmma_commit_group();\n    wgmma_wait_group<0>();\n    pin(dq);\n"
        "    if (thread_index() % 32 == 0) mbarrier_arrive(empty(stage));\n",
        "    wgmma_commit_group();\n    if (thread_index() % 32 == 0) mbarrier_arrive(empty(stage));\n"
        "    wgmma_wait_group<0>();\n    pin(dq);\n",
        "may still be read|" + RACE,
        "long",
    ),
    Mutant(
        "no fence before the products",
        ROWS,
        "    wgmma_fence();\n    multiply<N>(x,",
        "    multiply<N>(x,",
        "without.*fence",
        "long",
    ),
    Mutant(
        "no fence before dv's products",
        KEYS,
        "        wgmma_fence();\n        add_products(dv",
        "        add_products(dv",
        "without.*fence",
        "long",
    ),
    Mutant(
        "panels of keys in another place",
        ROWS,
        "i * 16 * 128, N * 128, 1024)",
        "i * 16 * 128, 1024, 1024)",
        "",
        "long",
    ),
    Mutant(
        "panels of rows in another place",
        KEYS,
        "i * 16 * 128, BLOCK_M * 128, 1024)",
        "i * 16 * 128, 1024, 1024)",
        "",
        "long",
    ),
    Mutant(
        "places are read before they are there",
        KEYS,
        "        bar_sync(1, 128);   // all places are there\n",
        "",
        RACE,
        "long",
    ),
    Mutant(
        "more warps are waited for than read a step",
        KEYS,
        "mbarrier_init(empty(stage), 4 * KEY_GROUPS);",
        "mbarrier_init(empty(stage), 8);",
        "deadlock",
        "short prefix",
    ),
    Mutant(
        "two groups leave one share",
        KEYS,
        "KEY_GROUPS == 1 ? group : 0, dk, dv",
        "0, dk, dv",
        "threads of a block write",
        "short prefix",
    ),
    Mutant(
        "shares of blocks overwrite each other",
        BLOCK,
        "(share * prefixes + (c.packed ? 0 : t.prefix))",
        "(share * prefixes)",
        "two blocks write",
        "bank",
    ),
    Mutant(
        "what follows a prefix's end is not set",
        BLOCK,
        "        t.end_key = smaller(t.first_key + BLOCK_N, c.P);\n      }\n",
        "        t.end_key = smaller(t.first_key + BLOCK_N, t.keys);\n      }\n",
        "nothing wrote|no launch wrote",
        "bank",
    ),
    Mutant(
        "a bank's end is not listed",
        BANK,
        "    if (p.bank_first && thread_index() == 0) st_global(p.bank_first + c.N, units_before);\n",
        "",
        "nothing wrote|no launch wrote",
        "bank",
    ),
    Mutant("one share is not added", LAUNCHES, "p.shares * p.work.copies};", "1};", "", "short prefix"),
    *BACKWARD_BIAS_MUTANTS,
    without_weight(KEYS),
]
