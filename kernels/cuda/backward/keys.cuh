// Backward of keys: dK and dV of a tile of keys, over the rows that see them. Of the content, those of one sample; of the
// prefix, a share of the rows of the whole batch.
//
// Scores are held transposed, keys by rows, so that weights are a wgmma's operand in registers as they are. Two warpgroups
// have 64 keys each and the same rows, or, where a prefix has no more keys, the same keys and every other step of rows.
#pragma once

#include "backward/key_block.cuh"
#include "hopper_wrappers.cuh"

namespace fastprefix {

template <class T, int D, int KEY_GROUPS, bool OF_PREFIX, bool BIASED>
struct BackwardKeys {
  using Params = BackwardParams;
  static constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1), BLOCK_M = 64, BLOCK_N = 64 * KEY_GROUPS, STAGES = 2;
  static constexpr int BLOCKS_PER_SM = 1;
  // Of a prefix a block's groups leave sums of their own where they have the same keys.
  static constexpr int COPIES = GROUPS / KEY_GROUPS;
  using Block = KeyBlock<T, D, BLOCK_M, BLOCK_N, COPIES, OF_PREFIX, BIASED>;
  static constexpr uint32_t KEYS = BLOCK_N * D * 2, TILE = BLOCK_M * D * 2, STATS = BLOCK_M * sizeof(Float2);
  static constexpr uint32_t K = 0, V = KEYS, Q = 2 * KEYS, DOUT = Q + STAGES * TILE, ROWS = DOUT + STAGES * TILE;
  static constexpr uint32_t BARRIERS = ROWS + STAGES * STATS, TASK = BARRIERS + 2 * STAGES * 8, PLACES = TASK + 48;
  static constexpr uint32_t BIAS = PLACES + STAGES * BLOCK_M * 16, SHARED_BYTES = BIAS + (BIASED ? BLOCK_N * 4 : 0);
  static constexpr int64_t NOWHERE = -1;   // no offset of a tensor is odd

  static int64_t blocks(const BackwardParams& p) { return Block::blocks(p); }

  FP_DEVICE uint32_t q_tile(int stage) { return shared_base() + Q + stage * TILE; }
  FP_DEVICE uint32_t dout_tile(int stage) { return shared_base() + DOUT + stage * TILE; }
  FP_DEVICE uint32_t stats(int stage) { return shared_base() + ROWS + stage * STATS; }
  FP_DEVICE uint32_t places(int stage) { return shared_base() + PLACES + stage * BLOCK_M * 16; }
  FP_DEVICE uint32_t full(int stage) { return shared_base() + BARRIERS + 8 * stage; }
  FP_DEVICE uint32_t empty(int stage) { return full(STAGES + stage); }

  // A block's task waits in shared memory, not in registers, where it is needed before and after the loop or by few lanes.
  FP_DEVICE KeyTask saved() { return saved_task(shared_base() + TASK); }

  // Of a step's rows: what all their products need, and where q and do lie, which the copies then read from there. A row
  // that does not exist sees nothing, and is 0 in q and do.
  FP_DEVICE void find_rows(const BackwardParams& p, const KeyTask& task, int first, int stage) {
    const AttentionCall& c = p.call.forward;
    const int row = thread_index_again() % 128, G = static_cast<int>(p.by_G.divisor);
    if (row >= BLOCK_M) return;
    const KeyTask t = OF_PREFIX ? saved() : task;
    Float2 found{{-NEGATIVE_INFINITY, 0.0f}};
    int64_t of_q = NOWHERE, of_dout = 0;
    if (first + row < t.end_row) {
      const Place at = Block::place(p, t, first + row);
      found = ld_global(p.rows + ((int64_t{t.h_kv} * c.B + at.b) * c.S + at.s) * G + at.h - t.h_kv * G);
      of_q = offset(c.q, at);
      of_dout = offset(p.call.dout, at);
    }
    st_shared(stats(stage) + row * 8, found);
    const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
    st_shared(places(stage) + row * 16, Bits4{{low(of_q), low(of_q >> 32), low(of_dout), low(of_dout >> 32)}});
  }

  FP_DEVICE void copy_rows(const BackwardParams& p, int stage) {
    constexpr int CHUNKS = D / 8, STEP = 128 / CHUNKS;
    const AttentionCall& c = p.call.forward;
    const int thread = thread_index_again() % 128, chunk = thread % CHUNKS;
    const auto whole = [](uint32_t low, uint32_t high) { return static_cast<int64_t>(uint64_t{high} << 32 | low); };
    FP_NO_UNROLL
    for (int row = thread / CHUNKS; row < BLOCK_M; row += STEP) {
      const Bits4 at = ld_shared_bits4(places(stage) + row * 16);
      const int64_t of_q = whole(at.x[0], at.x[1]), of_dout = whole(at.x[2], at.x[3]);
      const uint32_t to = tile_place<BLOCK_M>(row, chunk);
      const bool q = of_q != NOWHERE && chunk * 8 < c.D, dout = of_q != NOWHERE && chunk * 8 < c.D_v;
      cp_async_16(q_tile(stage) + to, element(c.q, q ? of_q + chunk * 8 : 0), q ? 16 : 0);
      cp_async_16(dout_tile(stage) + to, element(p.call.dout, dout ? of_dout + chunk * 8 : 0), dout ? 16 : 0);
    }
  }

  FP_DEVICE void produce(const BackwardParams& p, const KeyTask& t) {
    const int steps = cdiv(t.end_row - t.first_row, BLOCK_M);
    FP_NO_UNROLL
    for (int step = 0; step <= steps; step++) {
      if (step < steps) {
        const int stage = step % STAGES;
        mbarrier_wait(empty(stage), ((step / STAGES) & 1) ^ 1);
        find_rows(p, t, t.first_row + step * BLOCK_M, stage);
        bar_sync(1, 128);   // all places are there
        copy_rows(p, stage);
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

  // Keys by rows: 64 of K or V against 64 of q or do.
  FP_DEVICE void multiply(float (&x)[BLOCK_M / 2], uint32_t keys, uint32_t tile) {
    FP_UNROLL
    for (int step = 0; step < D / 16; step++) {
      const uint32_t panel = step / 4, columns = step % 4 * 32;
      wgmma_ss<T, false>(x, matrix_descriptor(keys + panel * (BLOCK_N * 128) + columns, 16, 1024),
                         matrix_descriptor(tile + panel * (BLOCK_M * 128) + columns, 16, 1024), step > 0);
    }
  }
  // Their sum over the rows: keys by columns.
  FP_DEVICE void add_products(float (&sum)[D / 2], const uint32_t (&weights)[BLOCK_M / 16][4], uint32_t tile) {
    FP_UNROLL
    for (int i = 0; i < BLOCK_M / 16; i++)
      wgmma_rs<T, true>(sum, weights[i], matrix_descriptor(tile + i * 16 * 128, BLOCK_M * 128, 1024), true);
  }
  // A warp's first key, and the lane's two, counted from the block's.
  FP_DEVICE int first_place_of_warp(int group) { return (KEY_GROUPS == 1 ? 0 : group * 64) + thread_index_again() / 32 % 4 * 16; }
  FP_DEVICE int place_of_key(int group, int half) { return Block::key_of_lane(first_place_of_warp(group), half); }
  FP_DEVICE int first_key_of_warp(const KeyTask& t, int group) { return t.first_key + first_place_of_warp(group); }

  FP_DEVICE void consume(const BackwardParams& p, const KeyTask& t, int group) {
    const AttentionCall& c = p.call.forward;
    const int lane = thread_index() % 32, steps = cdiv(t.end_row - t.first_row, BLOCK_M);
    const uint32_t keys = KEY_GROUPS == 1 ? 0 : group * 64 * 128;
    const bool needs_k = Block::needs_k(p), needs_v = Block::needs_v(p), needs_ds = Block::needs_ds(p);
    const Logits logits = Logits::of(c.scale, c.softcap);
    const float cap = c.softcap * LOG2E;
    bool shown[2];
    FP_UNROLL for (int half = 0; half < 2; half++) shown[half] = Block::is_shown(c, t, Block::key_of_lane(first_key_of_warp(t, group), half));
    float dk[D / 2], dv[D / 2], dbias[2] = {0.0f, 0.0f};
    FP_UNROLL for (int e = 0; e < D / 2; e++) dk[e] = dv[e] = 0.0f;
    FP_NO_UNROLL
    for (int step = KEY_GROUPS == 1 ? group : 0; step < steps; step += COPIES) {
      const int stage = step % STAGES;
      float x[BLOCK_M / 2], dp[BLOCK_M / 2];
      mbarrier_wait(full(stage), step / STAGES & 1);
      wgmma_fence();
      multiply(x, shared_base() + K + keys, q_tile(stage));
      wgmma_commit_group();
      if (needs_ds) {
        wgmma_fence();
        multiply(dp, shared_base() + V + keys, dout_tile(stage));
        wgmma_commit_group();
      }
      wgmma_wait_group<0>();
      pin(x);
      if (needs_ds) pin(dp);
      FP_UNROLL for (int e = 0; e < BLOCK_M / 2; e++) x[e] = logit(x[e], logits);
      if constexpr (!OF_PREFIX) Block::hide(x, p, t, first_key_of_warp(t, group), t.first_row + step * BLOCK_M, shown);
      float bias[2] = {0.0f, 0.0f};
      if constexpr (BIASED)
        FP_UNROLL for (int half = 0; half < 2; half++) bias[half] = ld_shared(shared_base() + BIAS + place_of_key(group, half) * 4);
      Block::weigh(x, dp, dbias, bias, stats(stage), cap, needs_ds);
      uint32_t weights[BLOCK_M / 16][4], ds[BLOCK_M / 16][4];
      pack_operand<T, BLOCK_M>(weights, x);
      if (needs_k) {
        FP_UNROLL for (int e = 0; e < BLOCK_M / 2; e++) dp[e] *= x[e];
        pack_operand<T, BLOCK_M>(ds, dp);
      }
      if (needs_v) {
        wgmma_fence();
        add_products(dv, weights, dout_tile(stage));
        wgmma_commit_group();
      }
      if (needs_k) {
        wgmma_fence();
        add_products(dk, ds, q_tile(stage));
        wgmma_commit_group();
      }
      wgmma_wait_group<0>();
      pin(dv);
      pin(dk);
      if (lane == 0) mbarrier_arrive(empty(stage));
    }
    const KeyTask own = OF_PREFIX ? saved() : t;
    if constexpr (BIASED) Block::add_lanes(dbias);
    Block::leave(p, own, first_key_of_warp(own, group), KEY_GROUPS == 1 ? group : 0, dk, dv, dbias);
  }

  FP_DEVICE void run(const BackwardParams& p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const AttentionCall& c = p.call.forward;
    const KeyTask t = Block::task_of(p);
    if (thread_index() == 0) {
      save_task(shared_base() + TASK, t);
      FP_UNROLL
      for (int stage = 0; stage < STAGES; stage++) {
        mbarrier_init(full(stage), 128);
        mbarrier_init(empty(stage), 4 * KEY_GROUPS);   // warps that read a step's rows
      }
    }
    if (thread_index() < 256) {
      const bool of_k = thread_index() < 128;
      Block::copy_keys(shared_base() + (of_k ? K : V), c, of_k, t);
      cp_async_commit_group();
      cp_async_wait_group<0>();
      fence_proxy_async();
    }
    if (BIASED && thread_index() < BLOCK_N)
      st_shared(shared_base() + BIAS + thread_index() * 4, Block::bias_of_key(c, t, t.first_key + thread_index()));
    sync_block();   // barriers, keys, bias and task are there
    if (thread_index() < 128) {
      setmaxnreg_dec<24>();
      produce(p, t);
    } else {
      setmaxnreg_inc<240>();
      consume(p, t, thread_index() / 128 - 1);
    }
#else
    trap();   // a library that was built for other devices must not leave o as it was
#endif
  }
};

}  // namespace fastprefix
