// A tile of rows in the backward, as the kernels of all devices have it: q and do before the loop over keys, dS in it, and dQ
// after it. A lane has two rows.
#pragma once

#include "backward/params.cuh"
#include "forward/visible.cuh"

namespace fastprefix {

FP_DEVICE Lane lane_of(const BackwardParams& p, const RowTile& t, int group) {
  const AttentionCall& c = p.call.forward;
  return {c, p.by_G, t, thread_index() % 32, group, c.scale * LOG2E, c.softcap * LOG2E};
}

// q or do, by 128 threads.
template <int D, int BLOCK_M>
FP_DEVICE void copy_rows(uint32_t to, const BackwardParams& p, bool of_q, const RowTile& t) {
  const AttentionCall& c = p.call.forward;
  const Rows& x = of_q ? c.q : p.call.dout;
  copy_tile<BLOCK_M, D>(to, of_q ? c.D : c.D_v, x.data, [&](int row) {
    return t.first_row + row < t.rows ? element(x, offset(x, place_of(p.by_G, t, t.first_row + row))) : nullptr;
  });
}

// The lane's rows' log-sum-exp and delta.
FP_DEVICE void find_rows(Float2 (&row)[2], const BackwardParams& p, const Lane& me) {
  const int64_t first = (int64_t{me.t.h_kv} * p.call.forward.B + me.t.b) * me.t.rows;
  FP_UNROLL
  for (int half = 0; half < 2; half++) {
    const int r = row_of_lane(me, half);
    row[half] = r < me.t.rows ? ld_global(p.rows + first + r) : Float2{{-NEGATIVE_INFINITY, 0.0f}};
  }
}

// Of products with q and with do, to which `hide` adds a bias, and of which it hides those of keys that a row does not see:
// dS in dp.
template <int ELEMENTS, class Hide>
FP_DEVICE void row_gradients(float (&x)[ELEMENTS], float (&dp)[ELEMENTS], const Lane& me, const Float2 (&row)[2], Hide&& hide) {
  const Logits logits = Logits::of(me.c.scale, me.c.softcap);
  FP_UNROLL
  for (int e = 0; e < ELEMENTS; e++) {
    x[e] = logit(x[e], logits);
    dp[e] = through_cap(dp[e] - row[row_of(e)].x[1], x[e], me.cap);
  }
  hide(x);
  FP_UNROLL for (int e = 0; e < ELEMENTS; e++) dp[e] *= ex2_approx(x[e] - row[row_of(e)].x[0]);
}

template <class T, int D>
FP_DEVICE void store_dq(const BackwardParams& p, const Lane& me, const float (&dq)[D / 2]) {
  FP_UNROLL
  for (int half = 0; half < 2; half++) {
    const int r = row_of_lane(me, half);
    if (r >= me.t.rows) continue;
    const int64_t at = offset(p.call.dq, place_of(p.by_G, me.t, r));
    FP_UNROLL
    for (int j = 0; j < D / 8; j++) {
      const int column = j * 8 + accumulator_column(me.lane);
      if (column < me.c.D)
        st_global(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.call.dq.data) + at + column),
                  pack<T>(dq[4 * j + 2 * half] * me.c.scale, dq[4 * j + 2 * half + 1] * me.c.scale));
    }
  }
}

}  // namespace fastprefix
