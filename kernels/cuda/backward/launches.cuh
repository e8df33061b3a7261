// The backward for sm_90a on a stream: up to six launches, of which none is made for what nothing needs.
#pragma once

#include <algorithm>

#include "backward/delta.cuh"
#include "backward/keys.cuh"
#include "backward/rows.cuh"
#include "launch.cuh"

namespace fastprefix {

inline const char* backward_refusal(const BackwardCall& call) {
  const AttentionCall& c = call.forward;
  if (c.D % 8 || c.D_v % 8 || c.D > 128 || c.D_v > 128) return "head dims: expected multiples of 8 up to 128";
  if (c.B < 1 || c.S < 1 || c.H_kv < 1 || c.H < 1 || c.H % c.H_kv) return "shapes: expected rows, and groups of query heads";
  if (c.prefix_ids.data) return "prefix_ids: expected one prefix for all";
  if (int64_t{c.B} * c.S * (c.H / c.H_kv) >= int64_t{1} << 30) return "shapes: expected fewer than 2^30 rows of a head";
  return nullptr;
}

// A prefix of 64 tokens is one group's keys; of a longer one, two groups share the rows.
inline int prefix_key_groups(const AttentionCall& c) { return c.P <= 64 ? 1 : 2; }
inline bool needs_prefix(const BackwardCall& call) { return call.forward.P > 0 && (call.dprefix_k || call.dprefix_v); }

// Shares that fill the machine, each at least one step of rows.
inline int prefix_shares(const AttentionCall& c, int multiprocessors) {
  const int64_t tiles = cdiv(c.P, 64 * prefix_key_groups(c)) * int64_t{c.H_kv}, steps = cdiv(int64_t{c.B} * c.S * (c.H / c.H_kv), 64);
  return static_cast<int>(std::max<int64_t>(1, std::min(cdiv(int64_t{multiprocessors}, tiles), steps)));
}
// Their number in memory: where two groups have the same keys, each leaves its own.
inline int64_t shares_in_memory(const AttentionCall& c, int multiprocessors) {
  return prefix_shares(c, multiprocessors) * (2 / prefix_key_groups(c));
}

struct BackwardWorkspace {
  int64_t rows, share_k, share_v, bytes;
};
inline BackwardWorkspace workspace_of(const BackwardCall& call, int multiprocessors) {
  const AttentionCall& c = call.forward;
  const int64_t rows = int64_t{c.B} * c.H * c.S * 8;
  const int64_t tokens = needs_prefix(call) ? shares_in_memory(c, multiprocessors) * c.H_kv * c.P * 4 : 0;
  const auto padded = [](int64_t bytes) { return cdiv(bytes, 16) * 16; };
  const int64_t k = padded(rows), v = k + padded(call.dprefix_k ? tokens * c.D : 0);
  return {0, k, v, v + padded(call.dprefix_v ? tokens * c.D_v : 0)};
}

template <class Kernel>
const char* launch_tiles(BackwardParams params, int64_t tiles, void* stream) {
  params.tiles = static_cast<int>(tiles);
  return launch<Kernel>(Kernel::blocks(params), params, stream);
}

inline const char* add_shares(const BackwardParams& p, const float* from, float* to, int64_t width, int multiprocessors, void* stream) {
  const AttentionCall& c = p.call.forward;
  const AddShares::Params params{from, to, int64_t{c.H_kv} * c.P * width, static_cast<int>(shares_in_memory(c, multiprocessors))};
  return to ? launch<AddShares>(AddShares::blocks(params), params, stream) : nullptr;
}

template <class T, int D>
const char* launch_backward(const BackwardParams& params, int multiprocessors, void* stream) {
  const BackwardCall& call = params.call;
  const AttentionCall& c = call.forward;
  const char* error = launch<BackwardDelta<T>>(BackwardDelta<T>::blocks(params), params, stream);
  if (!error && call.dq.data) {
    const int64_t tiles = cdiv(int64_t{c.S} * (c.H / c.H_kv), 128);
    error = c.P <= 16 ? launch_tiles<BackwardRows<T, D, 16>>(params, tiles, stream) : launch_tiles<BackwardRows<T, D, 64>>(params, tiles, stream);
  }
  if (!error && (call.dk.data || call.dv.data) && c.T > 0)
    error = launch_tiles<BackwardKeys<T, D, 2, false>>(params, cdiv(c.T, 128), stream);
  if (error || !needs_prefix(call)) return error;
  error = prefix_key_groups(c) == 1 ? launch_tiles<BackwardKeys<T, D, 1, true>>(params, 1, stream)
                                    : launch_tiles<BackwardKeys<T, D, 2, true>>(params, cdiv(c.P, 128), stream);
  if (!error) error = add_shares(params, params.share_k, call.dprefix_k, c.D, multiprocessors, stream);
  return error ? error : add_shares(params, params.share_v, call.dprefix_v, c.D_v, multiprocessors, stream);
}

inline BackwardParams prepare_backward(const BackwardCall& call, void* workspace, int multiprocessors) {
  BackwardParams params{};
  params.call = call;
  params.by_G = divisor_of(call.forward.H / call.forward.H_kv);
  params.by_S = divisor_of(call.forward.S);
  const BackwardWorkspace at = workspace_of(call, multiprocessors);
  char* room = static_cast<char*>(workspace);
  params.rows = reinterpret_cast<Float2*>(room + at.rows);
  params.share_k = reinterpret_cast<float*>(room + at.share_k);
  params.share_v = reinterpret_cast<float*>(room + at.share_v);
  params.shares = needs_prefix(call) ? prefix_shares(call.forward, multiprocessors) : 0;
  return params;
}

}  // namespace fastprefix
