// Backward, last: the prefix's gradients from those of the shares of rows.
#pragma once

#include "backward/params.cuh"

namespace fastprefix {

// The shares of a prefix's sums, added up in their own order. A thread has four numbers of [H_kv, P, D].
struct AddShares {
  struct Params {
    const float* from;   // [shares, count]
    float* to;           // [count]
    int64_t count;
    int shares;
  };
  static constexpr int THREADS = 128, BLOCKS_PER_SM = 8;
  static constexpr uint32_t SHARED_BYTES = 0;

  static int64_t blocks(const Params& p) { return cdiv(p.count, 4 * THREADS); }

  FP_DEVICE void run(const Params& p) {
    const int64_t place = (static_cast<int64_t>(block_index()) * THREADS + thread_index()) * 4;
    if (place >= p.count) return;
    Float4 sum{};
    for (int share = 0; share < p.shares; share++) {
      const Float4 x = ld_global(reinterpret_cast<const Float4*>(p.from + share * p.count + place));
      FP_UNROLL for (int e = 0; e < 4; e++) sum.x[e] += x.x[e];
    }
    st_global(reinterpret_cast<Float4*>(p.to + place), sum);
  }
};

}  // namespace fastprefix
