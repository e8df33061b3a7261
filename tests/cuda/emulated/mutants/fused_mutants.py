"""Faults of the forward for sm_90a: those of every barrier, fence and wait, and of every layout."""

from __future__ import annotations

from tests.cuda.emulated.mutants.mutant import Mutant
from tests.cuda.emulated.mutants.prefix_bias_mutants import FORWARD_BIAS_MUTANTS

NAMES = ("consumer", "producer", "sm90", "segments", "rows")
CONSUMER, PRODUCER, KERNEL, SEGMENTS, ROWS = (f"forward/{name}.cuh" for name in NAMES)
LAUNCHES = "forward/launches.cuh"

FUSED_MUTANTS = [
    Mutant("a map without swizzle", LAUNCHES, "{64, box, 1, 1}, true}", "{64, box, 1, 1}, false}", "", "long"),
    Mutant(
        "rows of q with another stride",
        CONSUMER,
        "(Shared::ROWS / Shared::PANELS) + columns, 16, 1024)",
        "(Shared::ROWS / Shared::PANELS) + columns, 16, 512)",
        "",
        "long",
    ),
    Mutant(
        "panels of values in another place",
        CONSUMER,
        "step * 16 * 128, N * 128, 1024)",
        "step * 16 * 128, 1024, 1024)",
        "",
        "long",
    ),
    Mutant(
        "no wait for values",
        CONSUMER,
        "      mbarrier_wait(Shared::full_v(last), phase);\n",
        "",
        "without a barrier between|in flight|nothing wrote",
        "long",
    ),
    Mutant(
        "no wait for the first keys",
        CONSUMER,
        "    mbarrier_wait(Shared::full_k(state.step % STAGES), state.step / STAGES & 1);\n",
        "",
        "without a barrier between|in flight|nothing wrote",
        "long",
    ),
    Mutant(
        "another phase of keys",
        CONSUMER,
        "mbarrier_wait(Shared::full_k(stage), state.step / STAGES & 1);",
        "mbarrier_wait(Shared::full_k(stage), state.step / STAGES & 1 ^ 1);",
        "without a barrier between|in flight|deadlock|nothing wrote",
        "long",
    ),
    Mutant(
        "the producer does not wait",
        PRODUCER,
        "{ mbarrier_wait(barrier, ((step / STAGES) & 1) ^ 1); }",
        "{}",
        "more arrivals|in flight|race",
        "long",
    ),
    Mutant(
        "values are released before they were read",
        CONSUMER,
        "      wgmma_wait_group<0>();\n      pin(state.o);\n      release(Shared::empty_v(last));\n",
        "      release(Shared::empty_v(last));\n      wgmma_wait_group<0>();\n      pin(state.o);\n",
        "may still be read|in flight",
        "long",
    ),
    Mutant(
        "no wait for the scores",
        CONSUMER,
        "      wgmma_wait_group<1>();   // the scores are there, the values still under way\n",
        "",
        "while its wgmma|in flight",
        "long",
    ),
    Mutant(
        "weights are overwritten while they are multiplied",
        CONSUMER,
        "      wgmma_wait_group<0>();\n      pin(state.o);\n      release(Shared::empty_v(last));\n"
        "      rescale(state.o, alpha);\n      pack_operand<T, N>(weights, x);\n",
        "      pack_operand<T, N>(weights, x);\n      wgmma_wait_group<0>();\n      pin(state.o);\n"
        "      release(Shared::empty_v(last));\n      rescale(state.o, alpha);\n",
        "register operand",
        "long",
    ),
    Mutant(
        "no fence before the products",
        CONSUMER,
        "    wgmma_fence();\n    multiply_keys<N>(x, rows, Shared::k_tile(state.step % STAGES));",
        "    multiply_keys<N>(x, rows, Shared::k_tile(state.step % STAGES));",
        "without.*fence",
        "long",
    ),
    Mutant(
        "more bytes are expected than come",
        PRODUCER,
        "mbarrier_arrive_expect_tx(full, KEYS * D * 2);",
        "mbarrier_arrive_expect_tx(full, KEYS * D * 2 + 128);",
        "deadlock",
        "long",
    ),
    Mutant(
        "no fence after the barriers' init", KERNEL, "      fence_mbarrier_init();\n", "", "not fenced|fence", "long"
    ),
    Mutant(
        "no barrier after the barriers' init",
        KERNEL,
        "    sync_block();   // barriers and list are there\n",
        "",
        "not initialised|nothing wrote|without a barrier between",
        "long",
    ),
    Mutant(
        "no proxy fence after q's stores",
        KERNEL,
        "    fence_proxy_async();\n    sync_group(group);\n",
        "    sync_group(group);\n",
        "fence.proxy.async|fence_proxy_async",
        "long",
    ),
    Mutant(
        "no barrier after q's stores",
        KERNEL,
        "    fence_proxy_async();\n    sync_group(group);\n",
        "    fence_proxy_async();\n",
        "without a barrier between|nothing wrote",
        "long",
    ),
    Mutant(
        "no proxy fence after a tile's last rows",
        PRODUCER,
        "    fence_proxy_async();   // wgmma reads by another proxy than these lanes write\n",
        "",
        "fence.proxy.async|fence_proxy_async",
        "packed texts",
    ),
    Mutant(
        "no wait for a tile's last rows",
        PRODUCER,
        "    cp_async_wait_group<0>();\n",
        "",
        "in flight",
        "packed texts",
    ),
    Mutant(
        "one lane's rows are all that is waited for",
        PRODUCER,
        "    sync_warp();\n    if (lane == 0) mbarrier_arrive(full);",
        "    if (lane == 0) mbarrier_arrive(full);",
        "race|without|nothing wrote|in flight",
        "packed texts",
    ),
    Mutant(
        "o overwrites q while it is multiplied",
        KERNEL,
        "    sync_group(group);   // every warp's products with q are done\n",
        "",
        "may still be read|race",
        "long",
    ),
    Mutant(
        "o is written before all lanes have left theirs",
        ROWS,
        "  sync_warp();   // a warp reads its own 16 rows\n",
        "",
        "without a sync_warp|race",
        "long",
    ),
    Mutant(
        "bounds are read before all warps have left theirs",
        SEGMENTS,
        "  sync_block();\n  FP_UNROLL\n  for (int i = 0; i < WARPS; i++)",
        "  FP_UNROLL\n  for (int i = 0; i < WARPS; i++)",
        "race|nothing wrote|without a barrier between",
        "packed texts",
    ),
    *FORWARD_BIAS_MUTANTS,
]
