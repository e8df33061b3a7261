// Backward, first: delta = rowsum(do o) of each row, beside its log-sum-exp. A warp has a row.
#pragma once

#include "backward/params.cuh"

namespace fastprefix {

FP_DEVICE float widen(bf16_t, uint32_t bits) { return bits_to_float(bits << 16); }
FP_DEVICE float widen(half_t, uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); }

template <class T>
struct BackwardDelta {
  using Params = BackwardParams;
  static constexpr int THREADS = 128, ROWS = THREADS / 32, BLOCKS_PER_SM = 8;
  static constexpr uint32_t SHARED_BYTES = 0;

  static int64_t rows(const BackwardParams& p) { return int64_t{p.call.forward.B} * p.call.forward.H * p.call.forward.S; }
  static int64_t blocks(const BackwardParams& p) { return cdiv(rows(p), ROWS); }

  FP_DEVICE float products(const Bits4& x, const Bits4& y) {
    float sum = 0.0f;
    FP_UNROLL
    for (int i = 0; i < 4; i++)
      sum += widen(T{}, x.x[i] & 0xffff) * widen(T{}, y.x[i] & 0xffff) + widen(T{}, x.x[i] >> 16) * widen(T{}, y.x[i] >> 16);
    return sum;
  }

  FP_DEVICE void run(const BackwardParams& p) {
    const AttentionCall& c = p.call.forward;
    const int64_t row = static_cast<int64_t>(block_index()) * ROWS + thread_index() / 32;
    if (row >= int64_t{c.B} * c.H * c.S) return;   // a whole warp
    const int lane = thread_index() % 32, G = static_cast<int>(p.by_G.divisor);
    const int64_t head = row / c.S;
    const Place at{static_cast<int>(head / c.H), static_cast<int>(row % c.S), static_cast<int>(head % c.H)};
    float delta = 0.0f;
    for (int column = lane * 8; column < c.D_v; column += 256)
      delta += products(ld_global(reinterpret_cast<const Bits4*>(element(c.o, offset(c.o, at) + column))),
                        ld_global(reinterpret_cast<const Bits4*>(element(p.call.dout, offset(p.call.dout, at) + column))));
    FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) delta += shfl_xor(delta, mask);
    if (lane != 0) return;
    const float lse = ld_global(c.lse + row);
    // A row that has seen nothing, or nothing but a sink as low as a mask: every weight is 0.
    const float base_2 = lse <= MASKED_BIAS ? -NEGATIVE_INFINITY : lse * LOG2E;
    const int h_kv = at.h / G;
    const int64_t place = (int64_t{h_kv} * c.B + at.b) * c.S * G + int64_t{at.s} * G + at.h % G;
    st_global(p.rows + place, Float2{{base_2, delta}});
  }
};

}  // namespace fastprefix
