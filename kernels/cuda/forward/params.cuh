// What the forward for sm_90a is launched with.
#pragma once

#include "forward/row_tile.cuh"
#include "hopper_wrappers.cuh"

namespace fastprefix {

struct ForwardParams {
  TensorMap k, v;                  // [B, H_kv, T, :] in boxes of BLOCK_N keys and 64 columns
  TensorMap prefix_k, prefix_v;    // [N, H_kv, P, :] in boxes of BLOCK_P; a packed bank is one prefix of all tokens
  AttentionCall call;
  Divisor by_G;
  int tiles;                       // of rows, of a sample and key/value head
};

}  // namespace fastprefix
