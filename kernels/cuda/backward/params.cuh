// What the backward kernels for sm_90a are launched with, and what of each row they all need.
//
// With P = softmax weights, which the merged log-sum-exp gives for prefix and content alike, and delta = rowsum(do o):
//   dV = P^T do,  dS = P (do V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q    (FlashAttention-2, Dao 2023)
// One kernel owns rows and computes dQ, another owns keys, of the content or of the prefix. The prefix's are the sum over
// the rows of all samples: rows are cut into shares, whose sums are added up in their own order, so that the same inputs
// give the same bits.
#pragma once

#include "backward_call.h"
#include "forward/row_tile.cuh"
#include "hopper_wrappers.cuh"

namespace fastprefix {

struct BackwardParams {
  BackwardCall call;
  Divisor by_G, by_S;
  Float2* rows;            // [H_kv, B, S * G]: base-2 log-sum-exp, +inf of a row that sees nothing, and delta
  float *share_k, *share_v;   // [shares, N, H_kv, P, D] and D_v: the prefix's gradients of each share of the rows
  int *bank_units, *bank_first;   // of a bank, as decoding lists them
  int tiles;               // of rows or of keys, of a sample and key/value head
  int shares;              // of the prefix's rows
};

// The logits of the backward: base 2, with the derivative of the cap.
FP_DEVICE float through_cap(float ds, float capped, float cap) {
  if (cap == 0.0f || capped == NEGATIVE_INFINITY) return ds;
  const float t = capped / cap;
  return ds * (1.0f - t * t);
}

// A tile of rows of 16-bit elements by cp.async, in panels of 64 columns as wgmma reads them; 0 where there is none. `at`
// gives the address of a row, or null. By 128 threads.
template <int ROWS, int D, class At>
FP_DEVICE void copy_tile(uint32_t to, int columns, const void* anything, At&& at) {
  constexpr int CHUNKS = D / 8, STEP = 128 / CHUNKS;
  const int chunk = thread_index() % 128 % CHUNKS;
  FP_NO_UNROLL
  for (int row = thread_index() % 128 / CHUNKS; row < ROWS; row += STEP) {
    const uint16_t* from = at(row);
    const bool inside = from && chunk * 8 < columns;
    const uint32_t place = to + chunk / 8 * (ROWS * 128) + static_cast<uint32_t>(row * 128 + ((chunk % 8 ^ (row & 7)) << 4));
    cp_async_16(place, inside ? from + chunk * 8 : anything, inside ? 16 : 0);
  }
}

FP_DEVICE const uint16_t* element(const Rows& x, int64_t offset) { return static_cast<const uint16_t*>(x.data) + offset; }

}  // namespace fastprefix
