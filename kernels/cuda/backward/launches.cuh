// The backward for sm_90a on a stream: up to six launches, of which none is made for what nothing needs.
#pragma once

#include <algorithm>

#include "backward/delta.cuh"
#include "backward/keys.cuh"
#include "backward/rows.cuh"
#include "backward/shares.cuh"
#include "decode/bank.cuh"
#include "decode/plan.h"
#include "launch.cuh"

namespace fastprefix {

inline const char* backward_refusal(const BackwardCall& call) {
  const AttentionCall& c = call.forward;
  if (c.D % 8 || c.D_v % 8 || c.D > 128 || c.D_v > 128) return "head dims: expected multiples of 8 up to 128";
  if (c.T >= MOST_KEYS || c.P >= MOST_KEYS || c.window > MOST_KEYS) return "keys: expected fewer than 2^29";
  if (c.prefix_ids.data && c.N < 1) return "prefix_ids: expected a bank of one prefix or more";
  if (c.B < 1 || c.S < 1 || c.H_kv < 1 || c.H < 1 || c.H % c.H_kv) return "shapes: expected rows, and groups of query heads";
  if (int64_t{c.B} * c.S * (c.H / c.H_kv) >= int64_t{1} << 30) return "shapes: expected fewer than 2^30 rows of a head";
  return nullptr;
}

// A prefix of 64 tokens is one group's keys; of a longer one, two groups share the rows.
inline int mean_tokens(const AttentionCall& c) { return c.packed ? cdiv(c.P, larger(c.N, 1)) : c.P; }
inline int prefix_key_groups(const AttentionCall& c) { return mean_tokens(c) <= 64 ? 1 : 2; }
inline int64_t prefix_tensors(const AttentionCall& c) { return c.packed ? 1 : c.N; }
// Tiles of keys, of a packed bank those of all its prefixes, each of which may end in one that is not full, as may the
// tokens behind the last.
inline int64_t prefix_key_tiles(const AttentionCall& c) {
  const int64_t tiles = cdiv(c.P, 64 * prefix_key_groups(c));
  return c.packed ? tiles + c.N + 1 : tiles;
}
inline bool needs_prefix(const BackwardCall& call) { return call.forward.P > 0 && (call.dprefix_k || call.dprefix_v); }

// Shares that fill the machine, each at least one step of rows.
inline int prefix_shares(const AttentionCall& c, int multiprocessors) {
  const int64_t used = prefixes_in_use(c), tiles = used * cdiv(mean_tokens(c), 64 * prefix_key_groups(c)) * c.H_kv;
  const int64_t steps = cdiv(int64_t{c.B} * c.S * (c.H / c.H_kv), 64 * used);
  // A padded bank has room for each prefix in each share: with many that nobody reads, few shares.
  const int64_t most = std::max<int64_t>(1, 8 * used / prefix_tensors(c));
  return static_cast<int>(std::max<int64_t>(1, std::min({cdiv(int64_t{multiprocessors}, std::max<int64_t>(1, tiles)), steps, most})));
}
// Their number in memory: where two groups have the same keys, each leaves its own.
inline int64_t shares_in_memory(const AttentionCall& c, int multiprocessors) {
  return prefix_shares(c, multiprocessors) * (2 / prefix_key_groups(c));
}

struct BackwardWorkspace {
  int64_t rows, share_k, share_v, units, first, bytes;
};
inline BackwardWorkspace workspace_of(const BackwardCall& call, int multiprocessors) {
  const AttentionCall& c = call.forward;
  const int64_t rows = int64_t{c.B} * c.H * c.S * 8;
  const int64_t tokens = needs_prefix(call) ? shares_in_memory(c, multiprocessors) * prefix_tensors(c) * c.H_kv * c.P * 4 : 0;
  const auto padded = [](int64_t bytes) { return cdiv(bytes, 16) * 16; };
  const int64_t k = padded(rows), v = k + padded(call.dprefix_k ? tokens * c.D : 0);
  const int64_t units = v + padded(call.dprefix_v ? tokens * c.D_v : 0);
  const bool bank = needs_prefix(call) && c.prefix_ids.data;
  const int64_t first = units + padded(bank ? int64_t{4} * c.B * (c.ids_by_row ? c.S : 1) : 0);
  return {0, k, v, units, first, first + padded(bank ? int64_t{4} * (c.N + 1) : 0)};
}

template <class Kernel>
const char* launch_tiles(BackwardParams params, int64_t tiles, void* stream) {
  params.tiles = static_cast<int>(tiles);
  return launch<Kernel>(Kernel::blocks(params), params, stream);
}

inline const char* add_shares(const BackwardParams& p, const float* from, float* to, int64_t width, int multiprocessors, void* stream) {
  const AttentionCall& c = p.call.forward;
  const AddShares::Params params{from, to, prefix_tensors(c) * c.H_kv * c.P * width, static_cast<int>(shares_in_memory(c, multiprocessors))};
  return to ? launch<AddShares>(AddShares::blocks(params), params, stream) : nullptr;
}

// Which units read which prefix of a bank.
inline const char* list_rows(const BackwardParams& p, void* stream) {
  DecodeParams params{};
  params.call = p.call.forward;
  params.plan.units = p.call.forward.B * (p.call.forward.ids_by_row ? p.call.forward.S : 1);
  params.plan.prefix_warps = 1;
  params.by_G = p.by_G;
  params.by_S = p.by_S;
  params.bank_units = p.bank_units;
  params.bank_first = p.bank_first;
  return launch<ListBankTiles>(1, params, stream);
}

template <class T, int D>
const char* launch_backward(const BackwardParams& params, int multiprocessors, void* stream) {
  const BackwardCall& call = params.call;
  const AttentionCall& c = call.forward;
  const char* error = launch<BackwardDelta<T>>(BackwardDelta<T>::blocks(params), params, stream);
  if (!error && call.dq.data) {
    const int64_t tiles = cdiv(int64_t{c.S} * (c.H / c.H_kv), 128);
    error = mean_tokens(c) <= 16 ? launch_tiles<BackwardRows<T, D, 16>>(params, tiles, stream) : launch_tiles<BackwardRows<T, D, 64>>(params, tiles, stream);
  }
  if (!error && (call.dk.data || call.dv.data) && c.T > 0)
    error = launch_tiles<BackwardKeys<T, D, 2, false>>(params, cdiv(c.T, 128), stream);
  if (error || !needs_prefix(call)) return error;
  if (params.bank_first) error = list_rows(params, stream);
  if (error) return error;
  const int64_t tiles = prefix_key_tiles(c);
  error = prefix_key_groups(c) == 1 ? launch_tiles<BackwardKeys<T, D, 1, true>>(params, tiles, stream)
                                    : launch_tiles<BackwardKeys<T, D, 2, true>>(params, tiles, stream);
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
  if (needs_prefix(call) && call.forward.prefix_ids.data) {
    params.bank_units = reinterpret_cast<int*>(room + at.units);
    params.bank_first = reinterpret_cast<int*>(room + at.first);
  }
  params.shares = needs_prefix(call) ? prefix_shares(call.forward, multiprocessors) : 0;
  return params;
}

}  // namespace fastprefix
