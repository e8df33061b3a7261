// Backward of rows for devices before and after Hopper: dQ of 128 packed rows of a sample and key/value head, over the tiles
// of keys that they see, the prefix's first. cp.async fetches the next tile while mma.sync multiplies one.
//
// A warp has 16 rows, whose q and do it keeps in registers; they came through the memory in which the tiles of keys and
// values lie afterwards.
#pragma once

#include "backward/row_block.cuh"
#include "forward/key_tiles.cuh"
#include "forward/segments.cuh"
#include "mma_tiles.cuh"

namespace fastprefix {

template <class T, int D, int BLOCK_P>
struct BackwardRowsSm80 {
  using Params = BackwardParams;
  static constexpr int WARPS = 8, THREADS = 32 * WARPS, BLOCK_M = 16 * WARPS, BLOCK_N = D == 128 ? 32 : 64, STAGES = 2;
  static constexpr int BLOCKS_PER_SM = 1;
  static constexpr uint32_t TILE = BLOCK_N * D * 2, K = 0, V = STAGES * TILE, Q = 0, DOUT = BLOCK_M * D * 2;
  static constexpr uint32_t LIST = 2 * DOUT, ROOM = LIST + (4 + 2 * BLOCK_M) * 4, OWN = ROOM + 2 * 8 * WARPS;
  static constexpr uint32_t SHARED_BYTES = OWN + 48;
  static_assert(BLOCK_P <= BLOCK_N && V + STAGES * TILE <= LIST && SHARED_BYTES <= 99 * 1024, "what a consumer card's block has");

  struct Shared {
    FP_DEVICE uint32_t segment_room() { return shared_base() + ROOM; }
    FP_DEVICE uint32_t list(int word) { return shared_base() + LIST + 4 * word; }   // as of ForwardShared
  };
  using Loop = KeyLoop<Shared, BLOCK_P, BLOCK_N>;
  FP_DEVICE uint32_t k_tile(int step) { return shared_base() + K + step % STAGES * TILE; }
  FP_DEVICE uint32_t v_tile(int step) { return shared_base() + V + step % STAGES * TILE; }
  FP_DEVICE RowTile tile() { return saved_tile(shared_base() + OWN); }

  static int64_t blocks(const BackwardParams& p) { return int64_t{p.call.forward.B} * p.call.forward.H_kv * p.tiles; }

  // The tiles where the loop is: half of the threads fetch the keys, half of them the values.
  FP_DEVICE void copy(const AttentionCall& c, const Loop& at) {
    const bool of_k = thread_index() < 128;
    const uint32_t to = of_k ? k_tile(at.step) : v_tile(at.step);
    Loop::template copy<D>(to, c, of_k ? c.prefix_k : c.prefix_v, of_k ? c.k : c.v, of_k ? c.D : c.D_v, tile(), at);
    cp_async_commit_group();
  }

  struct State {
    uint32_t q[D / 16][4], dout[D / 16][4];
    float dq[1][D / 2];
    Float2 row[2];
  };

  // One tile of N keys, whose copy was begun. `hide` hides those that a row does not see; `at` is of the next tile then.
  template <int N, class Hide>
  FP_DEVICE void step(const BackwardParams& p, State& state, Loop& at, Hide&& hide) {
    const int lane = thread_index_again() % 32;   // or addresses would take registers
    const Loop here = at;
    cp_async_wait_group<0>();
    sync_block();   // all threads' keys and values are there, and all warps are done with the tiles before
    Loop::advance(at);
    copy(p.call.forward, at);
    float x[1][N / 2], dp[1][N / 2];
    const auto copy_operand = [](uint32_t (&a)[1][4], const uint32_t (&from)[4]) { FP_UNROLL for (int i = 0; i < 4; i++) a[0][i] = from[i]; };
    multiply_by_rows<T, D, N, N>(x, k_tile(here.step), 0, lane, [&](uint32_t (&a)[1][4], int i) { copy_operand(a, state.q[i]); });
    multiply_by_rows<T, D, N, N>(dp, v_tile(here.step), 0, lane, [&](uint32_t (&a)[1][4], int i) { copy_operand(a, state.dout[i]); });
    const RowTile t = tile();
    const Lane me = lane_of(p, t, thread_index() / 128);
    row_gradients(x[0], dp[0], me, state.row, [&](float(&x)[N / 2]) { hide(x, me, here); });
    uint32_t ds[1][N / 16][4];
    pack_operand<T, N>(ds[0], dp[0]);
    add_product<T, D, N, N>(state.dq, ds, k_tile(here.step), 0, lane);
  }

  FP_DEVICE void run(const BackwardParams& p) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)   // where there is a kernel of its own
    const AttentionCall& c = p.call.forward;
    RowTile t = row_tile<BLOCK_M>(c, p.by_G, p.tiles);
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    copy_rows<D, BLOCK_M>(shared_base() + (thread_index() < 128 ? Q : DOUT), p, thread_index() < 128, t);
    cp_async_commit_group();
    if (warp == 0) list_prefixes<Shared, BLOCK_M, BLOCK_P>(c, p.by_G, t);
    find_segments<Shared, BLOCK_M, THREADS>(c, t);
    if (thread_index() == 0) save_tile(shared_base() + OWN, t);
    cp_async_wait_group<0>();
    sync_block();   // rows, list and tile are there
    State state;
    FP_UNROLL
    for (int i = 0; i < D / 16; i++) {
      load_operand<BLOCK_M>(state.q[i], shared_base() + Q, warp * 16, i, lane);
      load_operand<BLOCK_M>(state.dout[i], shared_base() + DOUT, warp * 16, i, lane);
    }
    find_rows(state.row, p, lane_of(p, t, thread_index() / 128));
    FP_UNROLL for (int e = 0; e < D / 2; e++) state.dq[0][e] = 0.0f;
    const bool shared_by_all = ld_shared_int(Shared::list(2));
    Loop at = Loop::begin(t);
    sync_block();   // all warps have their rows, which keys overwrite
    copy(c, at);
    FP_NO_UNROLL
    while (at.step < at.prefix_tiles)
      step<BLOCK_P>(p, state, at, [&](float(&x)[BLOCK_P / 2], const Lane& me, const Loop& here) {
        mask_prefix(x, me, here.walk.prefix, here.walk.first, here.walk.keys, shared_by_all);
      });
    FP_NO_UNROLL
    while (at.step < at.tiles)
      step<BLOCK_N>(p, state, at, [&](float(&x)[BLOCK_N / 2], const Lane& me, const Loop& here) { hide_content(x, me, Loop::first_key(me.t, here)); });
    cp_async_wait_group<0>();
    const RowTile own = tile();
    store_dq<T, D>(p, lane_of(p, own, thread_index() / 128), state.dq[0]);
#else
    trap();
#endif
  }
};

}  // namespace fastprefix
