// Decoding, last stage: the states of all shares of a row's keys, the prefix's first, become one softmax. A warp has a row.
#pragma once

#include "decode/output.cuh"

namespace fastprefix {

template <class T>
struct CombineShares {
  using Params = DecodeParams;
  static constexpr int THREADS = 128, ROWS = THREADS / 32, BLOCKS_PER_SM = 8, WIDEST = 256;
  static constexpr uint32_t SHARED_BYTES = 0;

  static int64_t blocks(const DecodeParams& p) { return cdiv(p.plan.rows, ROWS); }

  // Rows without a prefix have no states in its slots.
  FP_DEVICE int first_slot(const DecodeParams& p, const Place& place) {
    const Integers& ids = p.call.prefix_ids;
    if (!ids.data || p.plan.prefix_splits == 0) return 0;
    const int64_t at = place.b * ids.batch + (p.call.ids_by_row ? place.s * ids.row : 0);
    return is_prefix(p.call, integer_at(ids, at)) ? 0 : p.plan.prefix_splits;
  }

  FP_DEVICE void run(const DecodeParams& p) {
    const AttentionCall& c = p.call;
    const int lane = thread_index() % 32;
    const int64_t row = static_cast<int64_t>(block_index()) * ROWS + thread_index() / 32, rows = p.plan.rows;
    if (row >= rows) return;   // a whole warp
    const int64_t token = row / c.S;
    const Place place{static_cast<int>(token / c.H), static_cast<int>(row % c.S), static_cast<int>(token % c.H)};
    const int first = first_slot(p, place), end = p.plan.prefix_splits + p.plan.content_splits;

    float m = NEGATIVE_INFINITY;
    for (int slot = first + lane; slot < end; slot += 32) m = larger(m, ld_global(p.m + slot * rows + row));
    FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) m = larger(m, shfl_xor(m, mask));

    float l = 0.0f;
    Float4 acc[WIDEST / 128] = {};
    for (int base = first; base < end; base += 32) {
      float weight = 0.0f, sum = 0.0f;
      if (base + lane < end) {
        const int64_t at = (base + lane) * rows + row;
        sum = ld_global(p.l + at);
        weight = ex2_approx(ld_global(p.m + at) - shift_of(m));
      }
      const int count = smaller(32, end - base);
      FP_NO_UNROLL
      for (int i = 0; i < count; i++) {
        const float its_weight = shfl_idx(weight, i), its_sum = shfl_idx(sum, i);
        if (its_sum == 0.0f) continue;   // it has seen nothing and left no values
        l += its_weight * its_sum;
        const float* values = p.acc + ((base + i) * rows + row) * c.D_v;
        FP_UNROLL
        for (int part = 0; part < WIDEST / 128; part++) {
          const int column = part * 128 + lane * 4;
          if (column >= c.D_v) continue;
          const Float4 x = ld_global(reinterpret_cast<const Float4*>(values + column));
          FP_UNROLL for (int e = 0; e < 4; e++) acc[part].x[e] += its_weight * x.x[e];
        }
      }
    }
    FP_UNROLL
    for (int part = 0; part < WIDEST / 128; part++) {
      const int column = part * 128 + lane * 4;
      if (column < c.D_v) write_row<T>(c, place, column, acc[part], m, l);
    }
  }
};

}  // namespace fastprefix
