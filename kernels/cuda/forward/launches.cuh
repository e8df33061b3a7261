// The forward on a stream: one launch, of the kernel for sm_90a or of that for all other devices.
#pragma once

#include "forward/sm80.cuh"
#include "forward/sm90.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"

namespace fastprefix {

// Heads of keys or values as the copy engine sees them: [batch, head, key, column], in boxes of `keys` and 64 columns. An
// expanded dimension, of stride 0, which it does not know, counts as one of size 1.
inline TensorBox boxes_of(const Rows& x, int64_t batch, int64_t heads, int64_t keys, int64_t columns, int box) {
  TensorBox found{x.data, 4, {columns, keys, heads, batch}, {1, x.row, x.head, x.batch}, {64, box, 1, 1}, true};
  for (int d = 1; d < 4; d++) {
    if (found.stride[d] == 0 && d > 1) found.size[d] = 1;
    if (found.size[d] == 1) found.stride[d] = 64;   // of no consequence, but a number that it takes
  }
  return found;
}

// Keys of a tile of the prefix: no more than the next of these three. Of a packed bank the mean length counts, and with a
// bias 128 are too many.
inline int prefix_tile(const AttentionCall& c) {
  const int tokens = c.packed ? cdiv(c.P, larger(c.N, 1)) : c.P;
  static_assert(MOST_BIASED_KEYS == 64);
  return tokens <= 16 ? 16 : tokens <= 64 || c.prefix_bias ? 64 : 128;
}

// What the kernel cannot take, or null.
inline const char* forward_refusal(const AttentionCall& c) {
  if (c.D % 8 || c.D_v % 8 || c.D > 128 || c.D_v > 128) return "head dims: expected multiples of 8 up to 128";
  if (c.T >= MOST_KEYS || c.P >= MOST_KEYS || c.window > MOST_KEYS) return "keys: expected fewer than 2^29";
  if (c.prefix_ids.data && c.N < 1) return "prefix_ids: expected a bank of one prefix or more";
  if (c.B < 1 || c.S < 1 || c.H_kv < 1 || c.H < 1 || c.H % c.H_kv) return "shapes: expected rows, and groups of query heads";
  if (int64_t{c.S} * (c.H / c.H_kv) >= int64_t{1} << 30) return "shapes: expected fewer than 2^30 rows of a sample";
  return nullptr;
}

template <int BLOCK_M, int BLOCK_N>
const char* prepare_forward(const AttentionCall& call, int block_p, ForwardParams& params) {
  params.call = call;
  params.by_G = divisor_of(call.H / call.H_kv);
  params.tiles = static_cast<int>(cdiv(int64_t{call.S} * (call.H / call.H_kv), BLOCK_M));
  const int64_t prefixes = call.packed ? 1 : call.N;
  const struct {
    TensorMap* map;
    TensorBox box;
  } maps[] = {{&params.k, boxes_of(call.k, call.B, call.H_kv, call.T, call.D, BLOCK_N)},
              {&params.v, boxes_of(call.v, call.B, call.H_kv, call.T, call.D_v, BLOCK_N)},
              {&params.prefix_k, boxes_of(call.prefix_k, prefixes, call.H_kv, call.P, call.D, block_p)},
              {&params.prefix_v, boxes_of(call.prefix_v, prefixes, call.H_kv, call.P, call.D_v, block_p)}};
  for (const auto& [map, box] : maps) {
    if (box.size[1] == 0) continue;   // an empty tensor has no map, and is never read
    if (box.size[1] > 1 && box.stride[1] == 0) return "keys and values: expected rows that are not one row, expanded";
    if (const char* reason = encode_tensor_map(map, box)) return reason;
  }
  return nullptr;
}

template <class T, int D, int BLOCK_P>
const char* launch_forward(const AttentionCall& call, void* stream) {
  using Kernel = ForwardSm90<T, D, BLOCK_P>;
  ForwardParams params{};
  const char* reason = prepare_forward<Kernel::BLOCK_M, Kernel::BLOCK_N>(call, BLOCK_P, params);
  return reason ? reason : launch<Kernel>(Kernel::blocks(params), params, stream);
}

template <class T, int D, int BLOCK_P>
const char* launch_forward_sm80(const AttentionCall& call, void* stream) {
  using Kernel = ForwardSm80<T, D, BLOCK_P>;
  const int64_t rows = int64_t{call.S} * (call.H / call.H_kv);
  const ForwardSm80Params params{call, divisor_of(call.H / call.H_kv), static_cast<int>(cdiv(rows, Kernel::BLOCK_M))};
  return launch<Kernel>(Kernel::blocks(params), params, stream);
}

// All of its instances, which are compiled beside the others.
const char* forward_sm80(const AttentionCall& call, void* stream);

}  // namespace fastprefix
