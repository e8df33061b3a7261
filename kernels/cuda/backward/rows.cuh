// Backward of rows: dQ of 128 packed rows of a sample and key/value head, over the tiles of keys that they see, the
// prefix's first. One warpgroup fetches keys and values by cp.async, two multiply by wgmma, 64 rows each.
#pragma once

#include "backward/row_block.cuh"
#include "forward/key_tiles.cuh"
#include "forward/segments.cuh"
#include "hopper_wrappers.cuh"

namespace fastprefix {

template <class T, int D, int BLOCK_P>
struct BackwardRows {
  using Params = BackwardParams;
  static constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1), BLOCK_M = 64 * GROUPS, BLOCK_N = 64, STAGES = 2;
  static constexpr int BLOCKS_PER_SM = 1, CONSUMER_WARPS = 4 * GROUPS;
  static constexpr uint32_t TILE = BLOCK_N * D * 2, ROWS = BLOCK_M * D * 2;
  static constexpr uint32_t Q = 0, DOUT = ROWS, K = 2 * ROWS, V = K + STAGES * TILE, BARRIERS = V + STAGES * TILE;
  static constexpr uint32_t ROOM = BARRIERS + 2 * STAGES * 8, LIST = ROOM + 2 * 8 * (THREADS / 32);
  static constexpr uint32_t SHARED_BYTES = LIST + (4 + 2 * BLOCK_M) * 4;
  static_assert(BLOCK_P <= BLOCK_N);

  struct Shared {
    FP_DEVICE uint32_t segment_room() { return shared_base() + ROOM; }
    FP_DEVICE uint32_t list(int word) { return shared_base() + LIST + 4 * word; }   // as of ForwardShared
  };
  using Walk = PrefixWalk<Shared, BLOCK_P>;
  FP_DEVICE uint32_t k_tile(int stage) { return shared_base() + K + stage * TILE; }
  FP_DEVICE uint32_t v_tile(int stage) { return shared_base() + V + stage * TILE; }
  FP_DEVICE uint32_t full(int stage) { return shared_base() + BARRIERS + 8 * stage; }
  FP_DEVICE uint32_t empty(int stage) { return full(STAGES + stage); }

  static int64_t blocks(const BackwardParams& p) { return int64_t{p.call.forward.B} * p.call.forward.H_kv * p.tiles; }

  // Tiles arrive one after the other: while one is on its way, the one before is waited for and handed over.
  FP_DEVICE void produce(const BackwardParams& p, const RowTile& t) {
    const AttentionCall& c = p.call.forward;
    const int prefix_tiles = ld_shared_int(Shared::list(1)), tiles = prefix_tiles + cdiv(t.high - t.low, BLOCK_N);
    Walk walk{};
    if (prefix_tiles) walk = Walk::begin();
    FP_NO_UNROLL
    for (int step = 0; step <= tiles; step++) {
      if (step < tiles) {
        const int stage = step % STAGES;
        mbarrier_wait(empty(stage), ((step / STAGES) & 1) ^ 1);
        sync_warp();   // lanes overwrite what others of them have written
        if (step < prefix_tiles) {
          copy_prefix<BLOCK_P, D>(k_tile(stage), c, c.prefix_k, c.D, t.h_kv, walk.prefix, walk.first, walk.keys);
          copy_prefix<BLOCK_P, D>(v_tile(stage), c, c.prefix_v, c.D_v, t.h_kv, walk.prefix, walk.first, walk.keys);
          Walk::advance(walk);
        } else {
          const int first = t.low + (step - prefix_tiles) * BLOCK_N;
          copy_content<BLOCK_N, D>(k_tile(stage), c.k, c.D, t, first);
          copy_content<BLOCK_N, D>(v_tile(stage), c.v, c.D_v, t, first);
        }
      }
      cp_async_commit_group();
      if (step > 0) {
        cp_async_wait_group<1>();
        fence_proxy_async();   // wgmma reads by another proxy than these threads write
        mbarrier_arrive(full((step - 1) % STAGES));
      }
    }
    cp_async_wait_group<0>();
  }

  template <int N>
  FP_DEVICE void multiply(float (&x)[N / 2], uint32_t rows, uint32_t tile) {
    FP_UNROLL
    for (int step = 0; step < D / 16; step++) {
      const uint32_t panel = step / 4, columns = step % 4 * 32;
      wgmma_ss<T, false>(x, matrix_descriptor(rows + panel * (BLOCK_M * 128) + columns, 16, 1024),
                         matrix_descriptor(tile + panel * (N * 128) + columns, 16, 1024), step > 0);
    }
  }

  // One tile of N keys; `hide` hides those that a row does not see.
  template <int N, class Hide>
  FP_DEVICE void step(float (&dq)[D / 2], const Lane& me, const Float2 (&row)[2], int number, Hide&& hide) {
    const int stage = number % STAGES;
    const uint32_t group_rows = me.group * 64 * 128;
    float x[N / 2], dp[N / 2];
    mbarrier_wait(full(stage), number / STAGES & 1);
    wgmma_fence();
    multiply<N>(x, shared_base() + Q + group_rows, k_tile(stage));
    multiply<N>(dp, shared_base() + DOUT + group_rows, v_tile(stage));
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(x);
    pin(dp);
    row_gradients(x, dp, me, row, hide);
    uint32_t ds[N / 16][4];
    pack_operand<T, N>(ds, dp);
    wgmma_fence();
    FP_UNROLL
    for (int i = 0; i < N / 16; i++) wgmma_rs<T, true>(dq, ds[i], matrix_descriptor(k_tile(stage) + i * 16 * 128, N * 128, 1024), true);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(dq);
    if (thread_index() % 32 == 0) mbarrier_arrive(empty(stage));
  }

  FP_DEVICE void consume(const BackwardParams& p, const RowTile& t, int group) {
    const Lane me = lane_of(p, t, group);
    Float2 row[2];
    find_rows(row, p, me);
    float dq[D / 2];
    FP_UNROLL for (int e = 0; e < D / 2; e++) dq[e] = 0.0f;
    const int prefix_tiles = ld_shared_int(Shared::list(1)), content_tiles = cdiv(t.high - t.low, BLOCK_N);
    const bool shared_by_all = ld_shared_int(Shared::list(2));
    Walk walk{};
    if (prefix_tiles) walk = Walk::begin();
    FP_NO_UNROLL
    for (int i = 0; i < prefix_tiles; i++) {
      step<BLOCK_P>(dq, me, row, i, [&](float(&x)[BLOCK_P / 2]) {
        mask_prefix(x, me, walk.prefix, walk.first, walk.keys, shared_by_all);
      });
      Walk::advance(walk);
    }
    FP_NO_UNROLL
    for (int i = 0; i < content_tiles; i++)
      step<BLOCK_N>(dq, me, row, prefix_tiles + i, [&](float(&x)[BLOCK_N / 2]) { hide_content(x, me, t.low + i * BLOCK_N); });
    store_dq<T, D>(p, me, dq);
  }

  FP_DEVICE void run(const BackwardParams& p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const AttentionCall& c = p.call.forward;
    RowTile t = row_tile<BLOCK_M>(c, p.by_G, p.tiles);
    if (thread_index() == 0) {
      FP_UNROLL
      for (int stage = 0; stage < STAGES; stage++) {
        mbarrier_init(full(stage), 128);
        mbarrier_init(empty(stage), CONSUMER_WARPS);
      }
    }
    // q and do stay for the whole loop: every warpgroup but the last fetches one of them.
    if (thread_index() < 256) {
      const bool of_q = thread_index() < 128;
      copy_rows<D, BLOCK_M>(shared_base() + (of_q ? Q : DOUT), p, of_q, t);
      cp_async_commit_group();
      cp_async_wait_group<0>();
      fence_proxy_async();
    }
    if (thread_index() / 32 == 8) list_prefixes<Shared, BLOCK_M, BLOCK_P>(c, p.by_G, t);
    find_segments<Shared, BLOCK_M, THREADS>(c, t);
    sync_block();   // barriers, rows and list are there
    if (thread_index() < 128) {
      setmaxnreg_dec<56>();
      produce(p, t);
    } else {
      setmaxnreg_inc<224>();
      consume(p, t, thread_index() / 128 - 1);
    }
#else
    trap();   // a library that was built for other devices must not leave o as it was
#endif
  }
};

}  // namespace fastprefix
