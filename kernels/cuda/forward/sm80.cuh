// Forward for devices before and after Hopper (Ampere, Ada, consumer Blackwell): prefix and content in one loop over tiles,
// which cp.async fetches and mma.sync multiplies (FlashAttention-2, Dao 2023, with two sources of keys).
//
// There is one tile of keys and one of values: values arrive while keys are multiplied, and the next keys while the softmax
// and the values are. A warp has 32 rows in two parts, so that what it reads of a tile serves two products; at head dim 128
// a block takes 49 KiB, of which an A100's multiprocessor holds two, and a consumer card's one.
#pragma once

#include "forward/key_tiles.cuh"
#include "forward/rows.cuh"
#include "forward/segments.cuh"
#include "mma_tiles.cuh"

namespace fastprefix {

struct ForwardSm80Params {
  AttentionCall call;
  Divisor by_G;
  int tiles;   // of rows, of a sample and key/value head
};

template <class T, int D, int BLOCK_P>
struct ForwardSm80 {
  using Params = ForwardSm80Params;
  static constexpr int PARTS = 2, WARPS = 4, THREADS = 32 * WARPS, BLOCK_M = 64 * PARTS, BLOCKS_PER_SM = 2;
  static constexpr int BLOCK_N = D == 128 ? 32 : 64;
  static constexpr uint32_t Q = 0, K = BLOCK_M * D * 2, V = K + BLOCK_N * D * 2, LIST = V + BLOCK_N * D * 2;
  static constexpr uint32_t ROOM = LIST + (4 + 2 * BLOCK_M) * 4, TILE = ROOM + 2 * 8 * WARPS, SHARED_BYTES = TILE + 48;
  static_assert(BLOCK_P <= BLOCK_N && SHARED_BYTES <= 99 * 1024, "what a consumer card's block has");

  struct Shared {
    FP_DEVICE uint32_t segment_room() { return shared_base() + ROOM; }
    FP_DEVICE uint32_t list(int word) { return shared_base() + LIST + 4 * word; }   // as of ForwardShared
  };
  using Loop = KeyLoop<Shared, BLOCK_P, BLOCK_N>;

  static int64_t blocks(const Params& p) { return int64_t{p.call.B} * p.call.H_kv * p.tiles; }

  // What a warp carries through the loop, for each part of its rows.
  struct State {
    float o[PARTS][D / 2], m[PARTS][2], l[PARTS][2];
  };

  FP_DEVICE RowTile tile() { return saved_tile(shared_base() + TILE); }
  FP_DEVICE Lane lane_of(const Params& p, const RowTile& t, int part) {
    return {p.call, p.by_G, t, thread_index() % 32, part, softmax_scale(p.call), p.call.softcap * LOG2E};
  }

  // The tile of keys or of values where the loop is.
  FP_DEVICE void copy(uint32_t to, const AttentionCall& c, const Rows& prefix, const Rows& content, int columns, const Loop& at) {
    Loop::template copy<D>(to, c, prefix, content, columns, tile(), at);
    cp_async_commit_group();
  }
  FP_DEVICE void copy_keys(const AttentionCall& c, const Loop& at) { copy(shared_base() + K, c, c.prefix_k, c.k, c.D, at); }
  FP_DEVICE void copy_values(const AttentionCall& c, const Loop& at) { copy(shared_base() + V, c, c.prefix_v, c.v, c.D_v, at); }

  // One tile of N keys, whose copy was begun. `hide` hides those that a row does not see.
  template <int N, class Hide>
  FP_DEVICE void attend(const Params& p, State& state, Loop& at, Hide&& hide) {
    const AttentionCall& c = p.call;
    const int thread = thread_index_again(), lane = thread % 32, warp = thread / 32;   // or addresses would take registers
    cp_async_wait_group<0>();
    sync_block();   // all threads' keys are there, and all warps are done with the values before
    copy_values(c, at);
    float x[PARTS][N / 2];
    multiply_by_rows<T, D, N, N>(x, shared_base() + K, 0, lane, [&](uint32_t (&a)[PARTS][4], int step) {
      FP_UNROLL for (int i = 0; i < PARTS; i++) load_operand<BLOCK_M>(a[i], shared_base() + Q, i * 64 + warp * 16, step, lane);
    });
    const RowTile t = tile();
    FP_UNROLL
    for (int i = 0; i < PARTS; i++) {
      const Lane me = lane_of(p, t, i);
      scale_and_cap(x[i], me);
      hide(x[i], me);
    }
    cp_async_wait_group<0>();
    sync_block();   // all threads' values are there, and all warps are done with the keys
    Loop::advance(at);
    copy_keys(c, at);
    uint32_t weights[PARTS][N / 16][4];
    FP_UNROLL
    for (int i = 0; i < PARTS; i++) {
      float alpha[2];
      softmax_step(x[i], state.m[i], state.l[i], alpha, softmax_scale(c));
      rescale(state.o[i], alpha);
      pack_operand<T, N>(weights[i], x[i]);
    }
    add_product<T, D, N, N>(state.o, weights, shared_base() + V, 0, lane);
  }

  FP_DEVICE void run(const Params& p) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)   // where there is a kernel of its own
    const AttentionCall& c = p.call;
    RowTile t = row_tile<BLOCK_M>(c, p.by_G, p.tiles);
    FP_UNROLL for (int i = 0; i < PARTS; i++) load_rows<D, BLOCK_M>(shared_base() + Q, c, p.by_G, t, i);
    if (thread_index() < 32) list_prefixes<Shared, BLOCK_M, BLOCK_P>(c, p.by_G, t);
    find_segments<Shared, BLOCK_M, THREADS>(c, t);
    if (thread_index() == 0) save_tile(shared_base() + TILE, t);
    sync_block();   // rows, list and tile are there
    const bool shared_by_all = ld_shared_int(Shared::list(2));
    Loop at = Loop::begin(t);
    copy_keys(c, at);
    State state;
    FP_UNROLL
    for (int i = 0; i < PARTS; i++) {
      FP_UNROLL for (int e = 0; e < D / 2; e++) state.o[i][e] = 0.0f;
      FP_UNROLL
      for (int half = 0; half < 2; half++) {
        state.m[i][half] = NEGATIVE_INFINITY;
        state.l[i][half] = 0.0f;
      }
    }
    FP_NO_UNROLL
    while (at.step < at.prefix_tiles)
      attend<BLOCK_P>(p, state, at, [&](float(&x)[BLOCK_P / 2], const Lane& me) {
        mask_prefix(x, me, at.walk.prefix, at.walk.first, at.walk.keys, shared_by_all);
      });
    FP_NO_UNROLL
    while (at.step < at.tiles)
      attend<BLOCK_N>(p, state, at, [&](float(&x)[BLOCK_N / 2], const Lane& me) { hide_content(x, me, Loop::first_key(me.t, at)); });
    cp_async_wait_group<0>();
    const RowTile own = tile();
    FP_UNROLL
    for (int i = 0; i < PARTS; i++)
      store_rows<T, D, BLOCK_M>(shared_base() + Q, lane_of(p, own, i), state.o[i], state.m[i], state.l[i]);
#else
    trap();
#endif
  }
};

}  // namespace fastprefix
