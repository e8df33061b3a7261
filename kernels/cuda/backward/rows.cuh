// Backward of rows: dQ of 128 packed rows of a sample and key/value head, over the tiles of keys that they see, the
// prefix's first. One warpgroup fetches keys and values by cp.async, two multiply by wgmma, 64 rows each.
#pragma once

#include "backward/params.cuh"
#include "forward/segments.cuh"
#include "forward/visible.cuh"

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
    const int64_t h = t.h_kv, b = t.b;
    Walk walk{};
    if (prefix_tiles) walk = Walk::begin();
    FP_NO_UNROLL
    for (int step = 0; step <= tiles; step++) {
      if (step < tiles) {
        const int stage = step % STAGES;
        mbarrier_wait(empty(stage), ((step / STAGES) & 1) ^ 1);
        sync_warp();   // lanes overwrite what others of them have written
        if (step < prefix_tiles) {
          const int before = tokens_before(c, walk.prefix), n = walk.prefix;
          const int first = walk.first, keys = walk.keys;
          const auto row = [&](const Rows& x, int64_t at) {
            return [&x, at, first, keys](int i) { return first + i < keys ? element(x, at + (first + i) * x.row) : nullptr; };
          };
          copy_tile<BLOCK_P, D>(k_tile(stage), c.D, c.prefix_k.data, row(c.prefix_k, prefix_offset(c, c.prefix_k, n, before) + h * c.prefix_k.head));
          copy_tile<BLOCK_P, D>(v_tile(stage), c.D_v, c.prefix_v.data, row(c.prefix_v, prefix_offset(c, c.prefix_v, n, before) + h * c.prefix_v.head));
          Walk::advance(walk);
        } else {
          const int first = t.low + (step - prefix_tiles) * BLOCK_N;
          const auto row = [&](const Rows& x) {
            return [&x, h, b, first, &t](int i) {
              return first + i < t.high ? element(x, b * x.batch + h * x.head + (first + i) * x.row) : nullptr;
            };
          };
          copy_tile<BLOCK_N, D>(k_tile(stage), c.D, c.k.data, row(c.k));
          copy_tile<BLOCK_N, D>(v_tile(stage), c.D_v, c.v.data, row(c.v));
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
    const Logits logits = Logits::of(me.c.scale, me.c.softcap);
    FP_UNROLL for (int e = 0; e < N / 2; e++) x[e] = logit(x[e], logits);
    hide(x);
    FP_UNROLL
    for (int e = 0; e < N / 2; e++) {
      const Float2& mine = row[row_of(e)];
      const float weight = ex2_approx(x[e] - mine.x[0]);
      dp[e] = through_cap(weight * (dp[e] - mine.x[1]), x[e], me.cap);
    }
    uint32_t ds[N / 16][4];
    FP_UNROLL
    for (int i = 0; i < N / 16; i++)
      FP_UNROLL for (int j = 0; j < 4; j++) ds[i][j] = pack<T>(dp[8 * i + 2 * j], dp[8 * i + 2 * j + 1]);
    wgmma_fence();
    FP_UNROLL
    for (int i = 0; i < N / 16; i++) wgmma_rs<T, true>(dq, ds[i], matrix_descriptor(k_tile(stage) + i * 16 * 128, N * 128, 1024), true);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(dq);
    if (thread_index() % 32 == 0) mbarrier_arrive(empty(stage));
  }

  FP_DEVICE void consume(const BackwardParams& p, const RowTile& t, int group) {
    const AttentionCall& c = p.call.forward;
    const Lane me{c, p.by_G, t, thread_index() % 32, group, c.scale * LOG2E, c.softcap * LOG2E};
    const int64_t first = (int64_t{t.h_kv} * c.B + t.b) * t.rows;
    Float2 row[2];
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      const int r = row_of_lane(me, half);
      row[half] = r < t.rows ? ld_global(p.rows + first + r) : Float2{{-NEGATIVE_INFINITY, 0.0f}};
    }
    float dq[D / 2];
    FP_UNROLL for (int e = 0; e < D / 2; e++) dq[e] = 0.0f;
    const int prefix_tiles = ld_shared_int(Shared::list(1)), content_tiles = cdiv(t.high - t.low, BLOCK_N);
    const bool shared_by_all = ld_shared_int(Shared::list(2));
    Walk walk{};
    if (prefix_tiles) walk = Walk::begin();
    FP_NO_UNROLL
    for (int i = 0; i < prefix_tiles; i++) {
      step<BLOCK_P>(dq, me, row, i, [&](float(&x)[BLOCK_P / 2]) {
        hide_prefix(x, me, walk.prefix, walk.first, walk.keys, shared_by_all);
      });
      Walk::advance(walk);
    }
    FP_NO_UNROLL
    for (int i = 0; i < content_tiles; i++)
      step<BLOCK_N>(dq, me, row, prefix_tiles + i, [&](float(&x)[BLOCK_N / 2]) { hide_content(x, me, t.low + i * BLOCK_N); });
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      const int r = row_of_lane(me, half);
      if (r >= t.rows) continue;
      const int64_t at = offset(p.call.dq, place_of(p.by_G, t, r));
      FP_UNROLL
      for (int j = 0; j < D / 8; j++) {
        const int column = j * 8 + accumulator_column(me.lane);
        if (column < c.D)
          st_global(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.call.dq.data) + at + column),
                    pack<T>(dq[4 * j + 2 * half] * c.scale, dq[4 * j + 2 * half + 1] * c.scale));
      }
    }
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
      const Rows& x = of_q ? c.q : p.call.dout;
      copy_tile<BLOCK_M, D>(shared_base() + (of_q ? Q : DOUT), of_q ? c.D : c.D_v, x.data, [&](int row) {
        return t.first_row + row < t.rows ? element(x, offset(x, place_of(p.by_G, t, t.first_row + row))) : nullptr;
      });
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
