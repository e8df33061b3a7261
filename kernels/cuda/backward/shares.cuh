// Backward, last: the prefix's gradients from those of the shares of rows.
#pragma once

#include "backward/params.cuh"

namespace fastprefix {

struct Float1 { float x[1]; };

// The shares of a prefix's sums, added up in their own order. A thread has as many numbers as V: four of [H_kv, P, D], or
// one of [H_kv, P].
template <class V>
struct AddShares {
  struct Params {
    const float* from;   // [shares, count]
    float* to;           // [count]
    int64_t count;
    int shares;
  };
  static constexpr int THREADS = 128, BLOCKS_PER_SM = 8, NUMBERS = sizeof(V) / sizeof(float);
  static constexpr uint32_t SHARED_BYTES = 0;

  static int64_t blocks(const Params& p) { return cdiv(p.count, NUMBERS * THREADS); }

  FP_DEVICE void run(const Params& p) {
    const int64_t place = (static_cast<int64_t>(block_index()) * THREADS + thread_index()) * NUMBERS;
    if (place >= p.count) return;
    V sum{};
    for (int share = 0; share < p.shares; share++) {
      const V x = ld_global(reinterpret_cast<const V*>(p.from + share * p.count + place));
      FP_UNROLL for (int e = 0; e < NUMBERS; e++) sum.x[e] += x.x[e];
    }
    st_global(reinterpret_cast<V*>(p.to + place), sum);
  }
};

}  // namespace fastprefix
