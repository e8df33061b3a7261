// Backward of keys for devices before and after Hopper: dK and dV of a tile of keys, over the rows that see them. cp.async
// fetches the next step's rows while mma.sync multiplies one.
//
// Scores are held transposed, keys by rows, so that weights are an operand in registers as they are. A warp has 16 keys.
// Where a prefix has no more keys than some of the warps have, ROW_WARPS of them have the same keys and a part of a step's
// rows each, and leave sums of their own.
#pragma once

#include "backward/key_block.cuh"
#include "mma_tiles.cuh"

namespace fastprefix {

template <class T, int D, int KEY_WARPS, int ROW_WARPS, bool OF_PREFIX, bool BIASED>
struct BackwardKeysSm80 {
  using Params = BackwardParams;
  static constexpr int WARPS = KEY_WARPS * ROW_WARPS, THREADS = 32 * WARPS, WARP_ROWS = KEY_WARPS == 1 ? 16 : 32, STAGES = 2;
  static constexpr int BLOCK_M = WARP_ROWS * ROW_WARPS, BLOCK_N = 16 * KEY_WARPS, BLOCKS_PER_SM = 1;
  static_assert(OF_PREFIX || ROW_WARPS == 1, "content is written, not left as a sum of shares");
  using Block = KeyBlock<T, D, BLOCK_M, BLOCK_N, ROW_WARPS, OF_PREFIX, BIASED>;
  static constexpr uint32_t KEYS = BLOCK_N * D * 2, TILE = BLOCK_M * D * 2, STATS = BLOCK_M * sizeof(Float2);
  static constexpr uint32_t K = 0, V = KEYS, Q = 2 * KEYS, DOUT = Q + STAGES * TILE, ROWS = DOUT + STAGES * TILE;
  static constexpr uint32_t TASK = ROWS + STAGES * STATS, OF_KEYS = TASK + 48, SUMS = OF_KEYS + BLOCK_N * 4;
  static constexpr uint32_t SHARED_BYTES = SUMS + (BIASED ? ROW_WARPS * BLOCK_N * 4 : 0);
  static_assert(SHARED_BYTES <= 99 * 1024, "what a consumer card's block has");

  FP_DEVICE KeyTask task() { return saved_task(shared_base() + TASK); }   // for few registers are left
  FP_DEVICE uint32_t q_tile(int step) { return shared_base() + Q + step % STAGES * TILE; }
  FP_DEVICE uint32_t dout_tile(int step) { return shared_base() + DOUT + step % STAGES * TILE; }
  FP_DEVICE uint32_t stats(int step) { return shared_base() + ROWS + step % STAGES * STATS; }
  // Whether padding shows a key of the content, counted from the block's first, or the bias of one of the prefix.
  FP_DEVICE uint32_t of_key(int place) { return shared_base() + OF_KEYS + place * 4; }

  // Where a row warp's gradient of a key's bias is summed: two more registers would spill.
  FP_DEVICE uint32_t of_sum(int copy, int place) { return shared_base() + SUMS + (copy * BLOCK_N + place) * 4; }

  FP_DEVICE void add_to_sums(float (&dbias)[2], int key_warp, int copy, int lane) {
    Block::add_lanes(dbias);
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      const uint32_t sum = of_sum(copy, key_warp * 16 + accumulator_row(lane, half));
      if (lane % 4 == 0) st_shared(sum, ld_shared(sum) + dbias[half]);
    }
  }

  FP_DEVICE int first_key_of_warp(const KeyTask& t) { return t.first_key + thread_index_again() / 32 % KEY_WARPS * 16; }

  static int64_t blocks(const BackwardParams& p) { return Block::blocks(p); }

  // What all products of a step need of its rows. A row that does not exist sees nothing, and is 0 in q and do.
  FP_DEVICE void find_stats(const BackwardParams& p, const KeyTask& t, int step) {
    const int row = thread_index(), number = t.first_row + step * BLOCK_M + row, G = static_cast<int>(p.by_G.divisor);
    if (row >= BLOCK_M) return;
    Float2 found{{-NEGATIVE_INFINITY, 0.0f}};
    if (number < t.end_row) {
      const Place at = Block::place(p, t, number);
      found = ld_global(p.rows + ((int64_t{t.h_kv} * p.call.forward.B + at.b) * p.call.forward.S + at.s) * G + at.h - t.h_kv * G);
    }
    st_shared(stats(step) + row * 8, found);
  }
  FP_DEVICE void copy_rows(const BackwardParams& p, const KeyTask& t, int step, bool of_q) {
    const AttentionCall& c = p.call.forward;
    const Rows& x = of_q ? c.q : p.call.dout;
    const int first = t.first_row + step * BLOCK_M;
    copy_tile<BLOCK_M, D>(of_q ? q_tile(step) : dout_tile(step), of_q ? c.D : c.D_v, x.data, [&](int row) {
      return first + row < t.end_row ? element(x, offset(x, Block::place(p, t, first + row))) : nullptr;
    });
  }
  // One of two copies by 128 threads each: by those of half a block, or one after the other.
  template <class Copy>
  FP_DEVICE void both(Copy&& copy) {
    if (THREADS == 256) {
      copy(thread_index() < 128);
    } else {
      copy(true);
      copy(false);
    }
  }
  FP_DEVICE void fetch(const BackwardParams& p, int step, int steps) {
    if (step < steps) {
      const KeyTask t = task();
      find_stats(p, t, step);
      both([&](bool of_q) { copy_rows(p, t, step, of_q); });
    }
    cp_async_commit_group();
  }

  FP_DEVICE void run(const BackwardParams& p) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)   // where there is a kernel of its own
    static_assert(THREADS == 128 || THREADS == 256);
    const AttentionCall& c = p.call.forward;
    const KeyTask t = Block::task_of(p);
    const int steps = cdiv(t.end_row - t.first_row, BLOCK_M);
    const bool needs_k = Block::needs_k(p), needs_v = Block::needs_v(p), needs_ds = Block::needs_ds(p);
    both([&](bool of_k) { Block::copy_keys(shared_base() + (of_k ? K : V), c, of_k, t); });
    if (thread_index() == 0) save_task(shared_base() + TASK, t);
    if (thread_index() < BLOCK_N) {
      const int key = t.first_key + thread_index();
      if (!OF_PREFIX)
        st_shared(of_key(thread_index()), static_cast<int>(Block::is_shown(c, t, key)));
      else if (BIASED)
        st_shared(of_key(thread_index()), Block::bias_of_key(c, t, key));
      if (BIASED) FP_UNROLL for (int copy = 0; copy < ROW_WARPS; copy++) st_shared(of_sum(copy, thread_index()), 0.0f);
    }
    sync_block();   // the task is there
    fetch(p, 0, steps);
    float dk[1][D / 2], dv[1][D / 2];
    FP_UNROLL for (int e = 0; e < D / 2; e++) dk[0][e] = dv[0][e] = 0.0f;
    FP_NO_UNROLL
    for (int step = 0; step < steps; step++) {
      const int thread = thread_index_again(), lane = thread % 32, key_warp = thread / 32 % KEY_WARPS;   // or addresses take registers
      const int rows = thread / 32 / KEY_WARPS * WARP_ROWS;
      cp_async_wait_group<0>();
      sync_block();   // all threads' rows are there, and all warps are done with those before
      fetch(p, step + 1, steps);
      float x[1][WARP_ROWS / 2], dp[1][WARP_ROWS / 2];
      const auto keys = [&](uint32_t tile) {
        return [tile, key_warp, lane](uint32_t (&a)[1][4], int i) { load_operand<BLOCK_N>(a[0], tile, key_warp * 16, i, lane); };
      };
      multiply_by_rows<T, D, WARP_ROWS, BLOCK_M>(x, q_tile(step), rows, lane, keys(shared_base() + K));
      if (needs_ds) multiply_by_rows<T, D, WARP_ROWS, BLOCK_M>(dp, dout_tile(step), rows, lane, keys(shared_base() + V));
      const Logits logits = Logits::of(c.scale, c.softcap);
      FP_UNROLL for (int e = 0; e < WARP_ROWS / 2; e++) x[0][e] = logit(x[0][e], logits);
      if constexpr (!OF_PREFIX) {
        const KeyTask again = task();
        const int own = first_key_of_warp(again);
        const int place = own - again.first_key + lane / 4;
        const bool shown[2] = {ld_shared_int(of_key(place)) != 0, ld_shared_int(of_key(place + 8)) != 0};
        Block::hide(x[0], p, again, own, again.first_row + step * BLOCK_M, shown);
      }
      float bias[2] = {0.0f, 0.0f}, dbias[2] = {0.0f, 0.0f};
      if constexpr (BIASED)
        FP_UNROLL for (int half = 0; half < 2; half++) bias[half] = ld_shared(of_key(key_warp * 16 + accumulator_row(lane, half)));
      Block::weigh(x[0], dp[0], dbias, bias, stats(step) + rows * 8, c.softcap * LOG2E, needs_ds);
      if constexpr (BIASED) add_to_sums(dbias, key_warp, rows / WARP_ROWS, lane);
      uint32_t weights[1][WARP_ROWS / 16][4];
      if (needs_v) {
        pack_operand<T, WARP_ROWS>(weights[0], x[0]);
        add_product<T, D, WARP_ROWS, BLOCK_M>(dv, weights, dout_tile(step), rows, lane);
      }
      if (needs_k) {
        FP_UNROLL for (int e = 0; e < WARP_ROWS / 2; e++) dp[0][e] *= x[0][e];
        pack_operand<T, WARP_ROWS>(weights[0], dp[0]);
        add_product<T, D, WARP_ROWS, BLOCK_M>(dk, weights, q_tile(step), rows, lane);
      }
    }
    cp_async_wait_group<0>();
    const KeyTask own = task();
    float dbias[2] = {0.0f, 0.0f};
    if constexpr (BIASED) {
      const int warp = thread_index() / 32, first = warp % KEY_WARPS * 16;
      sync_warp();
      FP_UNROLL for (int half = 0; half < 2; half++) dbias[half] = ld_shared(of_sum(warp / KEY_WARPS, Block::key_of_lane(first, half)));
    }
    Block::leave(p, own, first_key_of_warp(own), thread_index() / 32 / KEY_WARPS, dk[0], dv[0], dbias);
#else
    trap();
#endif
  }
};

}  // namespace fastprefix
