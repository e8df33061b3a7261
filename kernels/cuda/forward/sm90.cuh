// Forward for sm_90a: prefix and content in one loop over tiles, which one warp fetches by the copy engine for two
// warpgroups that multiply by wgmma (FlashAttention-3, Shah et al. 2024, with two sources of keys).
//
// BLOCK_P is the width of a tile of the prefix: a short prefix is worth a matrix product of 16 keys, not one of 128. Head
// dims below D are filled with zeros: by the copy engine, and in the rows of q.
#pragma once

#include "forward/consumer.cuh"
#include "forward/producer.cuh"
#include "forward/rows.cuh"
#include "forward/segments.cuh"

namespace fastprefix {

template <class T, int D, int BLOCK_P>
struct ForwardSm90 {
  using Params = ForwardParams;
  static constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1), BLOCK_M = 64 * GROUPS, BLOCK_N = 128, STAGES = 2;
  static constexpr int BLOCKS_PER_SM = 1, CONSUMER_WARPS = 4 * GROUPS;
  using Shared = ForwardShared<D, BLOCK_M, BLOCK_N, STAGES>;
  using Producer = ForwardProducer<Shared, D, BLOCK_N, BLOCK_P, STAGES>;
  using Consumer = ForwardConsumer<T, Shared, D, STAGES>;
  static constexpr uint32_t SHARED_BYTES = Shared::BYTES;

  static int64_t blocks(const ForwardParams& p) { return int64_t{p.call.B} * p.call.H_kv * p.tiles; }

  FP_DEVICE void sync_group(int group) {
    static_assert(GROUPS == 2);
    // Numbers that the compiler knows: for any other it would reserve all barriers.
    if (group == 0)
      bar_sync(1, 128);
    else
      bar_sync(2, 128);
  }

  FP_DEVICE void consume(const ForwardParams& p, const RowTile& t, int group) {
    const AttentionCall& c = p.call;
    load_rows<D, BLOCK_M>(Shared::rows(), c, p.by_G, t, group);
    fence_proxy_async();
    sync_group(group);
    const Lane me{c, p.by_G, t, thread_index() % 32, group, softmax_scale(c), c.softcap * LOG2E};
    typename Consumer::State state;
    FP_UNROLL for (int e = 0; e < D / 2; e++) state.o[e] = 0.0f;
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      state.m[half] = NEGATIVE_INFINITY;
      state.l[half] = 0.0f;
    }
    state.step = 0;
    const int prefix_tiles = ld_shared_int(Shared::list(1)), shared_by_all = ld_shared_int(Shared::list(2));
    using Walk = PrefixWalk<Shared, BLOCK_P>;
    Walk walk{};
    if (prefix_tiles) walk = Walk::begin();
    Consumer::template attend<BLOCK_P>(state, me, prefix_tiles, [&](float(&x)[BLOCK_P / 2]) {
      scale_and_cap(x, me);
      mask_prefix(x, me, walk.prefix, walk.first, walk.keys, shared_by_all);
      Walk::advance(walk);
    });
    int first = t.low;
    Consumer::template attend<BLOCK_N>(state, me, cdiv(t.high - t.low, BLOCK_N), [&](float(&x)[BLOCK_N / 2]) {
      scale_and_cap(x, me);
      hide_content(x, me, first);
      first += BLOCK_N;
    });
    sync_group(group);   // every warp's products with q are done
    store_rows<T, D, BLOCK_M>(Shared::rows(), me, state.o, state.m, state.l);
  }

  FP_DEVICE void run(const ForwardParams& p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)   // other devices' binaries have no such instructions
    RowTile t = row_tile<BLOCK_M>(p.call, p.by_G, p.tiles);
    const int warp = thread_index() / 32;
    if (thread_index() == 0) {
      FP_UNROLL
      for (int stage = 0; stage < STAGES; stage++) {
        mbarrier_init(Shared::full_k(stage), 1);
        mbarrier_init(Shared::full_v(stage), 1);
        mbarrier_init(Shared::empty_k(stage), CONSUMER_WARPS);
        mbarrier_init(Shared::empty_v(stage), CONSUMER_WARPS);
      }
      fence_mbarrier_init();
    }
    if (warp == 1) list_prefixes<Shared, BLOCK_M, BLOCK_P>(p.call, p.by_G, t);
    find_segments<Shared, BLOCK_M, THREADS>(p.call, t);
    sync_block();   // barriers and list are there
    if (warp < 4) {
      setmaxnreg_dec<40>();
      if (warp == 0) Producer::run(p, t);
    } else {
      setmaxnreg_inc<232>();
      consume(p, t, warp / 4 - 1);
    }
#else
    trap();   // a library that was built for other devices must not leave o as it was
#endif
  }
};

}  // namespace fastprefix
