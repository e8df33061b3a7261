// Backward of keys: dK and dV of a tile of keys, over the rows that see them. Of the content, those of one sample; of the
// prefix, a share of the rows of the whole batch.
//
// Scores are held transposed, keys by rows, so that weights are a wgmma's operand in registers as they are. Two warpgroups
// have 64 keys each and the same rows, or, where a prefix has no more keys, the same keys and every other step of rows.
#pragma once

#include "backward/key_task.cuh"
#include "forward/visible.cuh"

namespace fastprefix {

template <class T, int D, int KEY_GROUPS, bool OF_PREFIX>
struct BackwardKeys {
  using Params = BackwardParams;
  static constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1), BLOCK_M = 64, BLOCK_N = 64 * KEY_GROUPS, STAGES = 2;
  static constexpr int BLOCKS_PER_SM = 1;
  // Shares of a prefix's sums: a block's groups leave one each where they have the same keys.
  static constexpr int SHARES_OF_BLOCK = GROUPS / KEY_GROUPS;
  static constexpr uint32_t KEYS = BLOCK_N * D * 2, TILE = BLOCK_M * D * 2, STATS = BLOCK_M * sizeof(Float2);
  static constexpr uint32_t K = 0, V = KEYS, Q = 2 * KEYS, DOUT = Q + STAGES * TILE, ROWS = DOUT + STAGES * TILE;
  static constexpr uint32_t BARRIERS = ROWS + STAGES * STATS, TASK = BARRIERS + 2 * STAGES * 8, PLACES = TASK + 48;
  static constexpr uint32_t SHARED_BYTES = PLACES + STAGES * BLOCK_M * 16;
  static constexpr int64_t NOWHERE = -1;   // no offset of a tensor is odd

  FP_DEVICE uint32_t q_tile(int stage) { return shared_base() + Q + stage * TILE; }
  FP_DEVICE uint32_t dout_tile(int stage) { return shared_base() + DOUT + stage * TILE; }
  FP_DEVICE uint32_t stats(int stage) { return shared_base() + ROWS + stage * STATS; }
  FP_DEVICE uint32_t places(int stage) { return shared_base() + PLACES + stage * BLOCK_M * 16; }
  FP_DEVICE uint32_t full(int stage) { return shared_base() + BARRIERS + 8 * stage; }
  FP_DEVICE uint32_t empty(int stage) { return full(STAGES + stage); }

  static int64_t blocks(const BackwardParams& p) {
    const AttentionCall& c = p.call.forward;
    return int64_t{p.tiles} * c.H_kv * (OF_PREFIX ? int64_t{p.shares} * (c.packed ? 1 : c.N) : c.B);
  }

  FP_DEVICE KeyTask task_of(const BackwardParams& p) {
    const AttentionCall& c = p.call.forward;
    const int rest = block_index() / p.tiles, rows_of_sample = c.S * static_cast<int>(p.by_G.divisor);
    KeyTask t{};
    t.first_key = block_index() % p.tiles * BLOCK_N;   // the longest of a causal head begin first
    t.h_kv = rest % c.H_kv;
    if constexpr (OF_PREFIX) {
      t.share = rest / c.H_kv % p.shares;
      if (c.packed) {
        find_packed<BLOCK_N>(c, block_index() % p.tiles, t);
      } else {
        t.prefix = rest / c.H_kv / p.shares;
        t.keys = prefix_length(c, t.prefix);
        t.end_key = smaller(t.first_key + BLOCK_N, c.P);
      }
      int rows = c.B * rows_of_sample;
      if (p.bank_first) {
        t.first_unit = t.prefix < 0 ? 0 : ld_global(p.bank_first + t.prefix);
        const int units = t.prefix < 0 ? 0 : ld_global(p.bank_first + t.prefix + 1) - t.first_unit;
        rows = units * static_cast<int>(p.by_G.divisor) * (c.ids_by_row ? 1 : c.S);
      }
      if (t.first_key >= t.keys) rows = 0;
      const Share steps = share_of(cdiv(rows, BLOCK_M), t.share, p.shares);
      t.first_row = steps.first * BLOCK_M;
      t.end_row = smaller(steps.end * BLOCK_M, rows);
    } else {
      t.b = rest / c.H_kv;
      t.keys = c.T;
      t.end_key = smaller(t.first_key + BLOCK_N, c.T);
      t.start = first_position_of(c, t.b);
      // Tokens that a causal row or a window lets see any of the keys.
      const int first = c.causal ? larger(0, smaller(c.S, t.first_key - t.start)) : 0;
      const int end = c.window ? larger(first, smaller(c.S, t.end_key - 1 + c.window - t.start)) : c.S;
      const int G = static_cast<int>(p.by_G.divisor);
      t.first_row = t.b * rows_of_sample + first * G;
      t.end_row = t.b * rows_of_sample + end * G;
    }
    return t;
  }

  // A block's task waits in shared memory, not in registers, where it is needed before and after the loop or by few lanes.
  FP_DEVICE void save(const KeyTask& t) {
    const int words[] = {t.h_kv, t.first_key, t.end_key, t.prefix, t.share, t.keys, static_cast<int>(t.token), t.end_row, t.first_unit};
    FP_UNROLL for (int i = 0; i < 9; i++) st_shared(shared_base() + TASK + i * 4, words[i]);
  }
  FP_DEVICE int saved(int word) { return ld_shared_int(shared_base() + TASK + word * 4); }
  FP_DEVICE KeyTask saved_rows() {
    KeyTask t{};
    t.h_kv = saved(0);
    t.end_row = saved(7);
    t.first_unit = saved(8);
    return t;
  }
  FP_DEVICE KeyTask saved_keys() {
    KeyTask t{};
    t.h_kv = saved(0);
    t.first_key = saved(1);
    t.end_key = saved(2);
    t.prefix = saved(3);
    t.share = saved(4);
    t.keys = saved(5);
    t.token = saved(6);
    return t;
  }

  FP_DEVICE Place place(const BackwardParams& p, const KeyTask& t, int row) {
    const int token = quotient(row, p.by_G), h = t.h_kv * static_cast<int>(p.by_G.divisor) + remainder(row, token, p.by_G);
    int b = quotient(token, p.by_S), s = remainder(token, b, p.by_S);
    if (OF_PREFIX && p.bank_first) {
      const int unit = ld_global(p.bank_units + t.first_unit + (p.call.forward.ids_by_row ? token : b));
      b = p.call.forward.ids_by_row ? quotient(unit, p.by_S) : unit;
      if (p.call.forward.ids_by_row) s = remainder(unit, b, p.by_S);
    }
    return {b, s, h};
  }

  // Of a step's rows: what all their products need, and where q and do lie, which the copies then read from there. A row
  // that does not exist is 0 in q and do, so that any finite weight will do.
  FP_DEVICE void find_rows(const BackwardParams& p, const KeyTask& task, int first, int stage) {
    const AttentionCall& c = p.call.forward;
    const int row = thread_index_again() % 128, G = static_cast<int>(p.by_G.divisor);
    if (row >= BLOCK_M) return;
    const KeyTask t = OF_PREFIX ? saved_rows() : task;
    Float2 found{{0.0f, 0.0f}};
    int64_t of_q = NOWHERE, of_dout = 0;
    if (first + row < t.end_row) {
      const Place at = place(p, t, first + row);
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
      const uint32_t to = chunk / 8 * (BLOCK_M * 128) + static_cast<uint32_t>(row * 128 + ((chunk % 8 ^ (row & 7)) << 4));
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
  FP_DEVICE void pack_weights(uint32_t (&weights)[BLOCK_M / 16][4], const float (&x)[BLOCK_M / 2]) {
    FP_UNROLL
    for (int i = 0; i < BLOCK_M / 16; i++)
      FP_UNROLL for (int j = 0; j < 4; j++) weights[i][j] = pack<T>(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
  }

  FP_DEVICE int key_of_lane(const KeyTask& t, int group, int half) {
    const int warp = thread_index() / 32 % 4, group_keys = KEY_GROUPS == 1 ? 0 : group * 64;
    return t.first_key + group_keys + warp * 16 + accumulator_row(thread_index() % 32, half);
  }

  // Hides the rows of a step that do not see a key; `shown`: whether padding shows the lane's two keys.
  FP_DEVICE void hide(float (&x)[BLOCK_M / 2], const BackwardParams& p, const KeyTask& t, int group, int first, const bool (&shown)[2]) {
    const AttentionCall& c = p.call.forward;
    const int before = t.b * c.S * static_cast<int>(p.by_G.divisor);   // rows of other samples
    const int first_position = t.start + quotient(first - before, p.by_G);
    const int last_position = t.start + quotient(smaller(first + BLOCK_M, t.end_row) - 1 - before, p.by_G);
    const bool whole = (!c.causal || t.end_key - 1 <= first_position) && (!c.window || t.first_key > last_position - c.window) && !c.segments.data;
    if (whole && vote_all(shown[0] && shown[1])) return;
    int key[2];
    int64_t segment[2] = {0, 0};
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      key[half] = key_of_lane(t, group, half);
      if (c.segments.data) segment[half] = segment_at(c, t.b, key[half]);
    }
    // In a loop that is not unrolled, one bit for each of the lane's scores of a key.
    uint32_t bits[2] = {0, 0};
    FP_NO_UNROLL
    for (int i = 0; i < BLOCK_M / 4; i++) {
      const int row = first + i / 2 * 8 + accumulator_column(thread_index() % 32) + i % 2;
      const int position = t.start + quotient(row - before, p.by_G);
      const int64_t own = c.segments.data ? segment_at(c, t.b, position) : 0;
      FP_UNROLL
      for (int half = 0; half < 2; half++) {
        const bool hidden = (c.causal && key[half] > position) || (c.window && key[half] <= position - c.window) || own != segment[half];
        if (shown[half] && !hidden) bits[half] |= 1u << i;
      }
    }
    FP_UNROLL
    for (int e = 0; e < BLOCK_M / 2; e++)
      if (!(bits[row_of(e)] >> (e / 4 * 2 + e % 2) & 1)) x[e] = NEGATIVE_INFINITY;
  }

  FP_DEVICE void consume(const BackwardParams& p, const KeyTask& t, int group) {
    const AttentionCall& c = p.call.forward;
    const int lane = thread_index() % 32, steps = cdiv(t.end_row - t.first_row, BLOCK_M);
    const uint32_t keys = KEY_GROUPS == 1 ? 0 : group * 64 * 128;
    const bool needs_k = OF_PREFIX ? p.call.dprefix_k != nullptr : p.call.dk.data != nullptr;
    const bool needs_v = OF_PREFIX ? p.call.dprefix_v != nullptr : p.call.dv.data != nullptr;
    const Logits logits = Logits::of(c.scale, c.softcap);
    const float cap = c.softcap * LOG2E;
    bool shown[2] = {true, true};
    if (!OF_PREFIX && c.padding) {
      FP_UNROLL
      for (int half = 0; half < 2; half++) {
        const int key = key_of_lane(t, group, half);
        shown[half] = key < c.T && ld_global(c.padding + t.b * c.padding_batch + key * c.padding_key) != 0;
      }
    }
    float dk[D / 2], dv[D / 2];
    FP_UNROLL for (int e = 0; e < D / 2; e++) dk[e] = dv[e] = 0.0f;
    FP_NO_UNROLL
    for (int step = KEY_GROUPS == 1 ? group : 0; step < steps; step += SHARES_OF_BLOCK) {
      const int stage = step % STAGES;
      float x[BLOCK_M / 2], dp[BLOCK_M / 2];
      mbarrier_wait(full(stage), step / STAGES & 1);
      wgmma_fence();
      multiply(x, shared_base() + K + keys, q_tile(stage));
      wgmma_commit_group();
      if (needs_k) {
        wgmma_fence();
        multiply(dp, shared_base() + V + keys, dout_tile(stage));
        wgmma_commit_group();
      }
      wgmma_wait_group<0>();
      pin(x);
      if (needs_k) pin(dp);
      FP_UNROLL for (int e = 0; e < BLOCK_M / 2; e++) x[e] = logit(x[e], logits);
      if constexpr (!OF_PREFIX) hide(x, p, t, group, t.first_row + step * BLOCK_M, shown);
      FP_UNROLL
      for (int j = 0; j < BLOCK_M / 8; j++) {
        const Float4 two = ld_shared4(stats(stage) + (j * 8 + accumulator_column(lane)) * 8);   // of two rows
        FP_UNROLL
        for (int e = 4 * j; e < 4 * j + 4; e++) {
          if (needs_k) dp[e] = through_cap(dp[e] - two.x[e % 2 * 2 + 1], x[e], cap);
          x[e] = ex2_approx(x[e] - two.x[e % 2 * 2]);
        }
      }
      uint32_t weights[BLOCK_M / 16][4], ds[BLOCK_M / 16][4];
      pack_weights(weights, x);
      if (needs_k) {
        FP_UNROLL for (int e = 0; e < BLOCK_M / 2; e++) dp[e] *= x[e];
        pack_weights(ds, dp);
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
    FP_UNROLL for (int e = 0; e < D / 2; e++) dk[e] *= c.scale;
    if constexpr (OF_PREFIX) {
      const KeyTask t = saved_keys();
      const int64_t share = t.share * SHARES_OF_BLOCK + (KEY_GROUPS == 1 ? group : 0), prefixes = c.packed ? 1 : c.N;
      const int64_t head = (share * prefixes + (c.packed ? 0 : t.prefix)) * c.H_kv + t.h_kv, at = head * c.P + t.token;
      if (needs_k) leave_share(p.share_k + at * c.D, dk, t, group, c.D);
      if (needs_v) leave_share(p.share_v + at * c.D_v, dv, t, group, c.D_v);
    } else {
      const int64_t h = t.h_kv, b = t.b;
      if (needs_k) store(p.call.dk, b * p.call.dk.batch + h * p.call.dk.head, dk, t, group, c.D);
      if (needs_v) store(p.call.dv, b * p.call.dv.batch + h * p.call.dv.head, dv, t, group, c.D_v);
    }
  }

  // Gives every key of the lane's two that is to be written, and two of its columns at a time, to `write`.
  template <class Write>
  FP_DEVICE void each_pair(const float (&x)[D / 2], const KeyTask& t, int group, int columns, Write&& write) {
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      const int64_t key = key_of_lane(t, group, half);
      if (key >= t.end_key) continue;
      FP_UNROLL
      for (int j = 0; j < D / 8; j++) {
        const int column = j * 8 + accumulator_column(thread_index() % 32);
        if (column < columns) write(key, column, x[4 * j + 2 * half], x[4 * j + 2 * half + 1]);
      }
    }
  }
  FP_DEVICE void leave_share(float* to, const float (&x)[D / 2], const KeyTask& t, int group, int columns) {
    each_pair(x, t, group, columns, [&](int64_t key, int column, float left, float right) {
      const bool exists = key < t.keys;
      st_global(reinterpret_cast<Float2*>(to + key * columns + column), exists ? Float2{{left, right}} : Float2{{0.0f, 0.0f}});
    });
  }
  FP_DEVICE void store(const Rows& to, int64_t before, const float (&x)[D / 2], const KeyTask& t, int group, int columns) {
    uint16_t* data = static_cast<uint16_t*>(to.data) + before;
    each_pair(x, t, group, columns, [&](int64_t key, int column, float left, float right) {
      st_global(reinterpret_cast<uint32_t*>(data + key * to.row + column), pack<T>(left, right));
    });
  }

  FP_DEVICE void run(const BackwardParams& p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const AttentionCall& c = p.call.forward;
    const KeyTask t = task_of(p);
    if (thread_index() == 0) {
      save(t);
      FP_UNROLL
      for (int stage = 0; stage < STAGES; stage++) {
        mbarrier_init(full(stage), 128);
        mbarrier_init(empty(stage), 4 * KEY_GROUPS);   // warps that read a step's rows
      }
    }
    if (thread_index() < 256) {
      const bool of_k = thread_index() < 128;
      const Rows& x = OF_PREFIX ? (of_k ? c.prefix_k : c.prefix_v) : (of_k ? c.k : c.v);
      int64_t before = t.b * x.batch + t.h_kv * x.head;
      if (OF_PREFIX) before += c.packed ? t.token * x.row : larger(t.prefix, 0) * x.batch;
      const int end = smaller(t.end_key, t.keys);
      copy_tile<BLOCK_N, D>(shared_base() + (of_k ? K : V), of_k ? c.D : c.D_v, x.data, [&](int key) {
        const int64_t number = t.first_key + key;
        return number < end ? element(x, before + number * x.row) : nullptr;
      });
      cp_async_commit_group();
      cp_async_wait_group<0>();
      fence_proxy_async();
    }
    sync_block();   // barriers, keys and task are there
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
