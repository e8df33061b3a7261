// What the backward kernels are launched with, and what of each row they all need.
//
// With P = softmax weights, which the merged log-sum-exp gives for prefix and content alike, and delta = rowsum(do o):
//   dV = P^T do,  dS = P (do V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q    (FlashAttention-2, Dao 2023)
// One kernel owns rows and computes dQ, another owns keys, of the content or of the prefix. The prefix's are the sum over
// the rows of all samples: rows are cut into shares, whose sums are added up in their own order, so that the same inputs
// give the same bits.
#pragma once

#include "backward_call.h"
#include "forward/row_tile.cuh"
#include "tiles.cuh"

namespace fastprefix {

// Of a prefix: keys of a block, rows of a step, and how many sums a block leaves.
struct PrefixWork {
  int keys, rows, copies;
};

struct BackwardParams {
  BackwardCall call;
  Divisor by_G, by_S;
  Float2* rows;            // [H_kv, B, S * G]: base-2 log-sum-exp, +inf of a row that sees nothing, and delta
  float *share_k, *share_v;   // [shares, N, H_kv, P, D] and D_v: the prefix's gradients of each share of the rows
  float* share_bias;          // [shares, N, H_kv, P]
  int *bank_units, *bank_first;   // of a bank, as decoding lists them
  PrefixWork work;
  int tiles;               // of rows or of keys, of a sample and key/value head
  int shares;              // of the prefix's rows
};

// The logits of the backward: base 2, with the derivative of the cap.
FP_DEVICE float through_cap(float ds, float capped, float cap) {
  if (cap == 0.0f || capped == NEGATIVE_INFINITY) return ds;
  const float t = capped / cap;
  return ds * (1.0f - t * t);
}

}  // namespace fastprefix
