// Decoding, first stage: a tile of rows against a share of the keys that they see, prefix and content in one loop. Blocks
// of the prefix and blocks of samples run in one launch.
//
// Four warps share a tile of keys in two stages of shared memory, which cp.async fills ahead. With 64 rows each warp has
// 16 of them and all keys; with 16 rows each has all rows and some of the keys. At 256 columns a warp has half of v's, for
// the registers' sake: 32 rows, or 16. Tensor cores are mma.sync's: reading the keys is what takes the time here.
#pragma once

#include "decode/params.cuh"
#include "decode/output.cuh"
#include "softmax.cuh"

namespace fastprefix {

// A head's keys and values, of the prefix or of a sample, and the first one that is not read.
struct KeySource {
  const uint16_t *k, *v;
  int64_t k_row, v_row;
  int end;
};

template <class T, int WIDTH, int WARPS_M>
struct AttendShare {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS, STAGES = 2;
  static constexpr int WARPS_N = WARPS_M > 1 ? 1 : WIDTH == 256 ? 2 : 4;    // warps over the keys of a tile
  static constexpr int WARPS_V = WARPS / (WARPS_M * WARPS_N);               // warps over v's columns
  static constexpr int BLOCK_M = 16 * WARPS_M, BLOCK_N = 8192 / WIDTH;
  static constexpr int KEYS = BLOCK_N / WARPS_N, COLUMNS = WIDTH / WARPS_V, CHUNKS = WIDTH / 8;   // KEYS, COLUMNS: a warp's
  static constexpr bool Q_IN_REGISTERS = WIDTH <= 128;   // wider, its fragments are loaded again for each tile

  static constexpr uint32_t TILE = BLOCK_N * WIDTH * 2, K_TILES = BLOCK_M * WIDTH * 2, V_TILES = K_TILES + STAGES * TILE;
  static constexpr uint32_t BIASES = V_TILES + STAGES * TILE, SHARED_BYTES = BIASES + STAGES * BLOCK_N * 4;
  // At the end the warps' states lie where the tiles were. Eight more numbers a row keep rows out of each other's banks.
  static constexpr int STATE_ROW = WIDTH + 8;
  static constexpr uint32_t MAXIMA = WARPS_N * BLOCK_M * STATE_ROW * 4, SUMS = MAXIMA + WARPS_N * BLOCK_M * 4;
  static_assert(SUMS + WARPS_N * BLOCK_M * 4 <= SHARED_BYTES);
  static_assert(SHARED_BYTES <= 99 * 1024, "what a consumer card's block has");

  struct Warp {
    int lane, m, n, v;   // which of the warps over rows, keys and columns this is
  };
  FP_DEVICE Warp this_warp() {
    const int warp = thread_index() / 32;
    return {thread_index() % 32, warp / (WARPS_N * WARPS_V), warp / WARPS_V % WARPS_N, warp % WARPS_V};
  }

  struct State {
    float acc[COLUMNS / 8][4], m[2], l[2];   // of rows accumulator_row(lane, 0 and 1)
  };

  FP_DEVICE uint32_t k_tile(int stage) { return shared_base() + K_TILES + stage * TILE; }
  FP_DEVICE uint32_t v_tile(int stage) { return shared_base() + V_TILES + stage * TILE; }

  FP_DEVICE uint32_t biases(int stage) { return shared_base() + BIASES + stage * BLOCK_N * 4; }

  FP_DEVICE void load_rows(const DecodeParams& p, const Task& task) {
    const uint16_t* q = static_cast<const uint16_t*>(p.call.q.data);
    FP_NO_UNROLL
    for (int i = thread_index(); i < BLOCK_M * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const bool inside = task.first_row + row < task.rows && chunk * 8 < p.call.D;
      const int64_t from = inside ? offset(p.call.q, place_of(p, task, task.first_row + row)) + chunk * 8 : 0;
      cp_async_16(shared_base() + tile_offset<WIDTH>(row, chunk), q + from, inside ? 16 : 0);
    }
  }

  // Rows behind the end and columns behind the tensor's are 0. A thread's chunks lie below each other.
  FP_DEVICE void load_keys(uint32_t to, const uint16_t* x, int64_t stride, int first, int end, int columns) {
    constexpr int STEP = THREADS / CHUNKS;
    const int row = thread_index() / CHUNKS, chunk = thread_index() % CHUNKS;
    const uint16_t* from = x + (first + row) * stride + chunk * 8;
    if (chunk * 8 >= columns) end = 0;
    FP_UNROLL
    for (int i = 0; i < BLOCK_N / STEP; i++) {
      const bool inside = first + row + i * STEP < end;
      cp_async_16(to + tile_offset<WIDTH>(row + i * STEP, chunk), inside ? from : x, inside ? 16 : 0);
      from += STEP * stride;
    }
  }

  FP_DEVICE void load_q_fragment(uint32_t (&a)[4], const Warp& warp, int step) {
    const int row = warp.m * 16 + lane_row_by_rows(warp.lane), chunk = step * 2 + lane_chunk_by_rows(warp.lane);
    ldmatrix_x4(a, shared_base() + tile_offset<WIDTH>(row, chunk));
  }

  // The warp's scores: 16 rows and KEYS keys.
  FP_DEVICE void multiply_keys(float (&x)[KEYS / 8][4], const uint32_t (&q)[WIDTH / 16][4], uint32_t tile, const Warp& warp) {
    FP_UNROLL
    for (int j = 0; j < KEYS / 8; j++) FP_UNROLL for (int e = 0; e < 4; e++) x[j][e] = 0.0f;
    FP_UNROLL
    for (int step = 0; step < WIDTH / 16; step++) {
      uint32_t a[4];
      if constexpr (Q_IN_REGISTERS) {
        FP_UNROLL for (int i = 0; i < 4; i++) a[i] = q[step][i];
      } else {
        load_q_fragment(a, warp, step);
      }
      FP_UNROLL
      for (int j = 0; j < KEYS / 16; j++) {
        uint32_t b[4];
        const int row = warp.n * KEYS + j * 16 + lane_row_by_columns(warp.lane);
        ldmatrix_x4(b, tile + tile_offset<WIDTH>(row, step * 2 + lane_chunk_by_columns(warp.lane)));
        mma_m16n8k16<T>(x[2 * j], a, b[0], b[1]);
        mma_m16n8k16<T>(x[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // One step of the running softmax; x becomes its weights.
  FP_DEVICE void update(State& state, float (&x)[KEYS / 8][4]) {
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      float m = state.m[half];
      FP_UNROLL
      for (int j = 0; j < KEYS / 8; j++) m = larger(m, larger(x[j][2 * half], x[j][2 * half + 1]));
      m = larger(m, shfl_xor(m, 1));
      m = larger(m, shfl_xor(m, 2));
      const float shift = shift_of(m), alpha = ex2_approx(state.m[half] - shift);
      float sum = 0.0f;
      FP_UNROLL
      for (int j = 0; j < KEYS / 8; j++) {
        FP_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          x[j][e] = ex2_approx(x[j][e] - shift);
          sum += x[j][e];
        }
      }
      state.m[half] = m;
      state.l[half] = state.l[half] * alpha + sum;   // of this lane's keys
      FP_UNROLL
      for (int j = 0; j < COLUMNS / 8; j++) {
        state.acc[j][2 * half] *= alpha;
        state.acc[j][2 * half + 1] *= alpha;
      }
    }
  }

  FP_DEVICE void multiply_values(State& state, const float (&x)[KEYS / 8][4], uint32_t tile, const Warp& warp) {
    FP_UNROLL
    for (int step = 0; step < KEYS / 16; step++) {
      const float(&left)[4] = x[2 * step], (&right)[4] = x[2 * step + 1];
      const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                             pack<T>(right[2], right[3])};
      const int row = warp.n * KEYS + step * 16 + lane_row_by_rows(warp.lane);
      FP_UNROLL
      for (int j = 0; j < COLUMNS / 16; j++) {
        uint32_t b[4];
        const int chunk = warp.v * COLUMNS / 8 + j * 2 + lane_chunk_by_rows(warp.lane);
        ldmatrix_x4_trans(b, tile + tile_offset<WIDTH>(row, chunk));
        mma_m16n8k16<T>(state.acc[2 * j], a, b[0], b[1]);
        mma_m16n8k16<T>(state.acc[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // The biases of the prefix's tile that begins at `first`, base 2, for all warps: each lane's own reads would take
  // addresses in registers, of which none is left.
  FP_DEVICE void load_bias(uint32_t to, const AttentionCall& c, const Task& task, int first) {
    const int place = thread_index_again();
    if (place >= BLOCK_N) return;
    const float* bias = bias_of_prefix(c, task.prefix, tokens_before(c, task.prefix), task.h_kv) + first;
    st_shared(to + place * 4, first + place < task.prefix_keys ? bias_at(bias, place) : 0.0f);
  }
  FP_DEVICE void add_bias(float (&x)[KEYS / 8][4], uint32_t from) {
    sync_warp();   // keeps this a branch: calls without a bias would issue it as predicated instructions
    const int thread = thread_index_again(), own = thread / 32 / WARPS_V % WARPS_N * KEYS + accumulator_column(thread % 32);
    FP_UNROLL
    for (int j = 0; j < KEYS / 8; j++) {
      FP_UNROLL
      for (int e = 0; e < 2; e++) {
        const float its = ld_shared(from + (own + j * 8 + e) * 4);
        x[j][e] += its;
        x[j][e + 2] += its;
      }
    }
  }

  // Hides keys of the tile that begins at `first`; position: the content position of each of the lane's two rows.
  FP_DEVICE void hide(float (&x)[KEYS / 8][4], const AttentionCall& c, const Task& task, const Warp& warp, bool of_prefix,
                      int first, const int (&position)[2]) {
    const int end = of_prefix ? task.prefix_keys : task.high;
    FP_UNROLL
    for (int j = 0; j < KEYS / 8; j++) {
      FP_UNROLL
      for (int e = 0; e < 2; e++) {
        const int key = first + warp.n * KEYS + j * 8 + accumulator_column(warp.lane) + e;
        bool seen = key < end;
        if (seen && !of_prefix && c.padding) seen = ld_global(c.padding + task.b * c.padding_batch + key * c.padding_key) != 0;
        FP_UNROLL
        for (int half = 0; half < 2; half++) {
          bool by_row = seen;
          if (!of_prefix && c.causal) by_row = by_row && key <= position[half];
          if (!of_prefix && c.window) by_row = by_row && key > position[half] - c.window;
          if (!by_row) x[j][2 * half + e] = NEGATIVE_INFINITY;
        }
      }
    }
  }

  FP_DEVICE void run(const DecodeParams& p, Task task) {
    const AttentionCall& c = p.call;
    const Warp warp = this_warp();
    const int64_t h = task.h_kv, b = task.b;
    const int before = tokens_before(c, task.prefix);
    if (c.packed) task.prefix_keys = smaller(task.prefix_keys, larger(0, c.P - before));
    const int64_t begin_k = prefix_offset(c, c.prefix_k, task.prefix, before), begin_v = prefix_offset(c, c.prefix_v, task.prefix, before);
    const auto head = [](const Rows& x, int64_t offset) { return static_cast<const uint16_t*>(x.data) + offset; };
    const KeySource prefix{head(c.prefix_k, begin_k + h * c.prefix_k.head), head(c.prefix_v, begin_v + h * c.prefix_v.head),
                           c.prefix_k.row, c.prefix_v.row, task.prefix_keys};
    const KeySource content{head(c.k, b * c.k.batch + h * c.k.head), head(c.v, b * c.v.batch + h * c.v.head),
                            c.k.row, c.v.row, task.high};

    const int prefix_tiles = cdiv(task.prefix_keys, BLOCK_N);
    const Share share = share_of(prefix_tiles + cdiv(task.high - task.low, BLOCK_N), task.split, task.splits);
    const auto first_key = [&](int i) { return i < prefix_tiles ? i * BLOCK_N : task.low + (i - prefix_tiles) * BLOCK_N; };
    const auto load = [&](int i) {
      // Field by field: the address of one of two structs would keep both in memory.
      const bool of_prefix = i < prefix_tiles;
      const int stage = i % STAGES, first = first_key(i), end = of_prefix ? prefix.end : content.end;
      load_keys(k_tile(stage), of_prefix ? prefix.k : content.k, of_prefix ? prefix.k_row : content.k_row, first, end, c.D);
      load_keys(v_tile(stage), of_prefix ? prefix.v : content.v, of_prefix ? prefix.v_row : content.v_row, first, end, c.D_v);
      // Behind the copies, which are on their way while these are read.
      if (c.prefix_bias && of_prefix) load_bias(biases(stage), c, task, first);
    };

    State state;
    FP_UNROLL
    for (int j = 0; j < COLUMNS / 8; j++) FP_UNROLL for (int e = 0; e < 4; e++) state.acc[j][e] = 0.0f;
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      state.m[half] = NEGATIVE_INFINITY;
      state.l[half] = 0.0f;
    }
    const Logits logits = Logits::of(c.scale, c.softcap);
    int position[2];
    FP_UNROLL
    for (int half = 0; half < 2; half++)
      position[half] = task.start + quotient(task.first_row + warp.m * 16 + accumulator_row(warp.lane, half), p.by_G);
    const int first_position = task.start + quotient(task.first_row, p.by_G);
    const int last_position = task.start + quotient(smaller(task.first_row + BLOCK_M, task.rows) - 1, p.by_G);

    if (share.first < share.end) {
      load_rows(p, task);
      load(share.first);
    }
    cp_async_commit_group();
    uint32_t q[WIDTH / 16][4];
    FP_NO_UNROLL
    for (int i = share.first; i < share.end; i++) {
      cp_async_wait_group<0>();
      // All threads' copies of this tile are there, and all warps are done with the tile that the next one overwrites.
      sync_block();
      if (i + 1 < share.end) load(i + 1);
      cp_async_commit_group();
      if (Q_IN_REGISTERS && i == share.first) {
        FP_UNROLL
        for (int step = 0; step < WIDTH / 16; step++) load_q_fragment(q[step], warp, step);
      }
      float x[KEYS / 8][4];
      multiply_keys(x, q, k_tile(i % STAGES), warp);
      to_logits(x, logits);
      const bool of_prefix = i < prefix_tiles;
      const int first = first_key(i), last = first + BLOCK_N - 1;
      if (c.prefix_bias && of_prefix) add_bias(x, biases(i % STAGES));
      const bool by_row = (c.causal && last > first_position) || (c.window && first <= last_position - c.window);
      if (last >= (of_prefix ? task.prefix_keys : task.high) || (!of_prefix && (c.padding || by_row)))
        hide(x, c, task, warp, of_prefix, first, position);
      update(state, x);
      multiply_values(state, x, v_tile(i % STAGES), warp);
    }
    leave(p, task, warp, state);
  }

  // The states of the warps that shared the rows become one, which is written: to its slot, or as o and lse.
  FP_DEVICE void leave(const DecodeParams& p, const Task& task, const Warp& warp, State& state) {
    const AttentionCall& c = p.call;
    sync_block();   // no warp reads tiles any more, and no copy is on its way
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      state.l[half] += shfl_xor(state.l[half], 1);
      state.l[half] += shfl_xor(state.l[half], 2);
      const int row = warp.n * BLOCK_M + warp.m * 16 + accumulator_row(warp.lane, half);
      if (warp.v == 0 && warp.lane % 4 == 0) {
        st_shared(shared_base() + MAXIMA + row * 4, state.m[half]);
        st_shared(shared_base() + SUMS + row * 4, state.l[half]);
      }
      FP_UNROLL
      for (int j = 0; j < COLUMNS / 8; j++) {
        const int column = warp.v * COLUMNS + j * 8 + accumulator_column(warp.lane);
        st_shared(shared_base() + (row * STATE_ROW + column) * 4, Float2{{state.acc[j][2 * half], state.acc[j][2 * half + 1]}});
      }
    }
    sync_block();
    FP_NO_UNROLL
    for (int i = thread_index(); i < BLOCK_M * (WIDTH / 4); i += THREADS) {
      const int row = i / (WIDTH / 4), column = i % (WIDTH / 4) * 4;
      if (task.first_row + row >= task.rows || column >= c.D_v) continue;
      float m = NEGATIVE_INFINITY, l = 0.0f;
      FP_UNROLL
      for (int n = 0; n < WARPS_N; n++) m = larger(m, ld_shared(shared_base() + MAXIMA + (n * BLOCK_M + row) * 4));
      Float4 acc{};
      FP_UNROLL
      for (int n = 0; n < WARPS_N; n++) {
        const int at = n * BLOCK_M + row;
        const float weight = ex2_approx(ld_shared(shared_base() + MAXIMA + at * 4) - shift_of(m));
        l += weight * ld_shared(shared_base() + SUMS + at * 4);
        const Float4 part = ld_shared4(shared_base() + (at * STATE_ROW + column) * 4);
        FP_UNROLL for (int e = 0; e < 4; e++) acc.x[e] += weight * part.x[e];
      }
      const Place place = place_of(p, task, task.first_row + row);
      if (p.plan.direct)
        write_row<T>(c, place, column, acc, m, l);
      else
        write_state(p, task.slot, place, column, acc, m, l);
    }
  }

  FP_DEVICE void write_state(const DecodeParams& p, int slot, const Place& place, int column, const Float4& acc, float m, float l) {
    const int64_t at = slot * p.plan.rows + place_in_lse(p.call, place);
    if (column == 0) {
      st_global(p.m + at, m);
      st_global(p.l + at, l);
    }
    // Nobody reads the values of a state that has seen nothing.
    if (l != 0.0f) st_global(reinterpret_cast<Float4*>(p.acc + at * p.call.D_v + column), acc);
  }
};

// The launch: blocks of the prefix first, for they are the longest.
template <class T, int WIDTH, int PREFIX_WARPS, int CONTENT_WARPS>
struct DecodeAttend {
  using Params = DecodeParams;
  using OfPrefix = AttendShare<T, WIDTH, PREFIX_WARPS>;
  using OfContent = AttendShare<T, WIDTH, CONTENT_WARPS>;
  static constexpr int THREADS = OfPrefix::THREADS, BLOCKS_PER_SM = PREFIX_WARPS > 1 ? 2 : 3;
  static constexpr uint32_t SHARED_BYTES =
      OfPrefix::SHARED_BYTES > OfContent::SHARED_BYTES ? OfPrefix::SHARED_BYTES : OfContent::SHARED_BYTES;

  static int64_t blocks(const DecodeParams& p) {
    const DecodePlan& plan = p.plan;
    const int64_t of_prefix = int64_t{plan.prefix_tiles} * plan.prefix_splits;
    return p.call.H_kv * (of_prefix + int64_t{p.call.B} * plan.content_tiles * plan.content_splits);
  }

  FP_DEVICE void run(const DecodeParams& p) {
    const int of_prefix = prefix_blocks(p), block = block_index();
    const bool first = block < of_prefix;
    const Task task = first ? prefix_task(p, block, OfPrefix::BLOCK_M) : content_task(p, block - of_prefix, OfContent::BLOCK_M);
    if (task.first_row >= task.rows) return;   // of a bank: there can be more tiles than there are
    if (PREFIX_WARPS == CONTENT_WARPS || !first)
      OfContent::run(p, task);
    else
      OfPrefix::run(p, task);
  }
};

}  // namespace fastprefix
