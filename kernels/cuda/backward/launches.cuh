// The backward on a stream: up to eight launches, of which none is made for what nothing needs.
#pragma once

#include <algorithm>

#include "backward/delta.cuh"
#include "backward/keys.cuh"
#include "backward/keys_sm80.cuh"
#include "backward/rows.cuh"
#include "backward/rows_sm80.cuh"
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

inline int mean_tokens(const AttentionCall& c) { return c.packed ? cdiv(c.P, larger(c.N, 1)) : c.P; }
inline int64_t prefix_tensors(const AttentionCall& c) { return c.packed ? 1 : c.N; }

// How many of a prefix's keys a block has and how many rows a step. Where a prefix has few keys, several parts of the block
// have the same, and leave sums of their own.
inline PrefixWork prefix_work(const AttentionCall& c, bool hopper) {
  const int tokens = mean_tokens(c);
  if (!hopper && tokens <= 16) return {16, 64, 4};
  if (tokens <= 64 || c.prefix_bias) return {64, 64, 2};   // with a bias, 128 keys would spill registers
  return {128, hopper ? 64 : 32, 1};
}
// Tiles of keys, of a packed bank those of all its prefixes, each of which may end in one that is not full, as may the
// tokens behind the last.
inline int64_t prefix_key_tiles(const AttentionCall& c, const PrefixWork& work) {
  const int64_t tiles = cdiv(c.P, work.keys);
  return c.packed ? tiles + c.N + 1 : tiles;
}
inline bool needs_prefix(const BackwardCall& call) { return call.forward.P > 0 && (call.dprefix_k || call.dprefix_v || call.dprefix_bias); }

// Shares that fill the machine, each at least 64 rows.
inline int prefix_shares(const AttentionCall& c, const PrefixWork& work, int multiprocessors) {
  const int64_t used = prefixes_in_use(c), tiles = used * cdiv(mean_tokens(c), work.keys) * c.H_kv;
  const int64_t steps = cdiv(int64_t{c.B} * c.S * (c.H / c.H_kv), 64 * used);
  // A padded bank has room for each prefix in each share: with many that nobody reads, few shares.
  const int64_t most = std::max<int64_t>(1, 8 * used / prefix_tensors(c));
  return static_cast<int>(std::max<int64_t>(1, std::min({cdiv(int64_t{multiprocessors}, std::max<int64_t>(1, tiles)), steps, most})));
}

struct BackwardWorkspace {
  int64_t rows, share_k, share_v, share_bias, units, first, bytes;
};
inline BackwardWorkspace workspace_of(const BackwardCall& call, int multiprocessors, bool hopper) {
  const AttentionCall& c = call.forward;
  const int64_t rows = int64_t{c.B} * c.H * c.S * 8;
  const PrefixWork work = prefix_work(c, hopper);
  const int64_t shares = needs_prefix(call) ? prefix_shares(c, work, multiprocessors) * work.copies : 0;
  const int64_t tokens = shares * prefix_tensors(c) * c.H_kv * c.P * 4;
  const auto padded = [](int64_t bytes) { return cdiv(bytes, 16) * 16; };
  const int64_t k = padded(rows), v = k + padded(call.dprefix_k ? tokens * c.D : 0);
  const int64_t bias = v + padded(call.dprefix_v ? tokens * c.D_v : 0), units = bias + padded(call.dprefix_bias ? tokens : 0);
  const bool bank = needs_prefix(call) && c.prefix_ids.data;
  const int64_t first = units + padded(bank ? int64_t{4} * c.B * (c.ids_by_row ? c.S : 1) : 0);
  return {0, k, v, bias, units, first, first + padded(bank ? int64_t{4} * (c.N + 1) : 0)};
}

template <class Kernel>
const char* launch_tiles(BackwardParams params, int64_t tiles, void* stream) {
  params.tiles = static_cast<int>(tiles);
  return launch<Kernel>(Kernel::blocks(params), params, stream);
}

template <class V>
const char* add_shares(const BackwardParams& p, const float* from, float* to, int64_t width, void* stream) {
  using Kernel = AddShares<V>;
  const AttentionCall& c = p.call.forward;
  const typename Kernel::Params params{from, to, prefix_tensors(c) * c.H_kv * c.P * width, p.shares * p.work.copies};
  return to ? launch<Kernel>(Kernel::blocks(params), params, stream) : nullptr;
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

// The kernels that differ between devices, in all of their instances for a dtype and a width.
template <class T, int D>
struct HopperKernels {
  static const char* rows(const BackwardParams& p, int64_t tiles, void* stream) {
    return mean_tokens(p.call.forward) <= 16 ? launch_tiles<BackwardRows<T, D, 16>>(p, tiles, stream)
                                             : launch_tiles<BackwardRows<T, D, 64>>(p, tiles, stream);
  }
  static const char* content(const BackwardParams& p, int64_t tiles, void* stream) {
    return launch_tiles<BackwardKeys<T, D, 2, false, false>>(p, tiles, stream);
  }
  template <bool BIASED>
  static const char* prefix(const BackwardParams& p, int64_t tiles, void* stream) {
    return BIASED || p.work.keys == 64 ? launch_tiles<BackwardKeys<T, D, 1, true, BIASED>>(p, tiles, stream)
                                       : launch_tiles<BackwardKeys<T, D, 2, true, false>>(p, tiles, stream);
  }
};
template <class T, int D>
struct Sm80Kernels {
  static const char* rows(const BackwardParams& p, int64_t tiles, void* stream) {
    return mean_tokens(p.call.forward) <= 16 ? launch_tiles<BackwardRowsSm80<T, D, 16>>(p, tiles, stream)
                                             : launch_tiles<BackwardRowsSm80<T, D, D == 128 ? 32 : 64>>(p, tiles, stream);
  }
  static const char* content(const BackwardParams& p, int64_t tiles, void* stream) {
    return launch_tiles<BackwardKeysSm80<T, D, 8, 1, false, false>>(p, tiles, stream);
  }
  template <bool BIASED>
  static const char* prefix(const BackwardParams& p, int64_t tiles, void* stream) {
    if (p.work.keys == 16) return launch_tiles<BackwardKeysSm80<T, D, 1, 4, true, BIASED>>(p, tiles, stream);
    return BIASED || p.work.keys == 64 ? launch_tiles<BackwardKeysSm80<T, D, 4, 2, true, BIASED>>(p, tiles, stream)
                                       : launch_tiles<BackwardKeysSm80<T, D, 8, 1, true, false>>(p, tiles, stream);
  }
};

template <class T, class Kernels>
const char* launch_backward(const BackwardParams& params, void* stream) {
  constexpr int ROWS = 128, KEYS = 128;   // of a block
  const BackwardCall& call = params.call;
  const AttentionCall& c = call.forward;
  const char* error = launch<BackwardDelta<T>>(BackwardDelta<T>::blocks(params), params, stream);
  if (!error && call.dq.data) error = Kernels::rows(params, cdiv(int64_t{c.S} * (c.H / c.H_kv), ROWS), stream);
  if (!error && (call.dk.data || call.dv.data) && c.T > 0) error = Kernels::content(params, cdiv(c.T, KEYS), stream);
  if (error || !needs_prefix(call)) return error;
  if (params.bank_first) error = list_rows(params, stream);
  const int64_t tiles = prefix_key_tiles(c, params.work);
  if (!error) error = c.prefix_bias ? Kernels::template prefix<true>(params, tiles, stream) : Kernels::template prefix<false>(params, tiles, stream);
  if (!error) error = add_shares<Float4>(params, params.share_k, call.dprefix_k, c.D, stream);
  if (!error) error = add_shares<Float4>(params, params.share_v, call.dprefix_v, c.D_v, stream);
  return error ? error : add_shares<Float1>(params, params.share_bias, call.dprefix_bias, 1, stream);
}

inline BackwardParams prepare_backward(const BackwardCall& call, void* workspace, int multiprocessors, bool hopper) {
  BackwardParams params{};
  params.call = call;
  params.by_G = divisor_of(call.forward.H / call.forward.H_kv);
  params.by_S = divisor_of(call.forward.S);
  params.work = prefix_work(call.forward, hopper);
  const BackwardWorkspace at = workspace_of(call, multiprocessors, hopper);
  char* room = static_cast<char*>(workspace);
  params.rows = reinterpret_cast<Float2*>(room + at.rows);
  params.share_k = reinterpret_cast<float*>(room + at.share_k);
  params.share_v = reinterpret_cast<float*>(room + at.share_v);
  params.share_bias = reinterpret_cast<float*>(room + at.share_bias);
  if (needs_prefix(call) && call.forward.prefix_ids.data) {
    params.bank_units = reinterpret_cast<int*>(room + at.units);
    params.bank_first = reinterpret_cast<int*>(room + at.first);
  }
  params.shares = needs_prefix(call) ? prefix_shares(call.forward, params.work, multiprocessors) : 0;
  return params;
}

// All instances for devices other than Hopper, which are compiled beside the others.
const char* backward_sm80(const BackwardParams& params, void* stream);

}  // namespace fastprefix
