// Decoding on one stream: up to three launches, which depend on the call's shapes alone.
#pragma once

#include "decode/attend.cuh"
#include "decode/bank.cuh"
#include "decode/combine.cuh"
#include "decode/plan.h"
#include "launch.cuh"

namespace fastprefix {

template <class Kernel>
const char* launch_blocks(const DecodeParams& params, void* stream) {
  return launch<Kernel>(Kernel::blocks(params), params, stream);
}

template <class T, int WIDTH>
const char* launch_attend(const DecodeParams& params, void* stream) {
  constexpr int MANY = WIDTH == 256 ? 2 : 4;
  if (params.plan.content_warps > 1) return launch_blocks<DecodeAttend<T, WIDTH, MANY, MANY>>(params, stream);
  if (params.plan.prefix_splits && params.plan.prefix_warps > 1)
    return launch_blocks<DecodeAttend<T, WIDTH, MANY, 1>>(params, stream);
  return launch_blocks<DecodeAttend<T, WIDTH, 1, 1>>(params, stream);
}

template <class T, int WIDTH>
const char* launch_decode(const DecodeParams& params, void* stream) {
  const char* error = params.plan.units ? launch<ListBankTiles>(1, params, stream) : nullptr;
  if (!error) error = launch_attend<T, WIDTH>(params, stream);
  return error || params.plan.direct ? error : launch_blocks<CombineShares<T>>(params, stream);
}

// What the kernels cannot take, or null: callers ask before, so that nobody sees these words.
inline const char* refusal(const AttentionCall& c) {
  if (c.D % 8 || c.D_v % 8 || c.D > 256 || c.D_v > 256) return "head dims: expected multiples of 8 up to 256";
  if (c.T >= MOST_KEYS || c.P >= MOST_KEYS || c.window > MOST_KEYS) return "keys: expected fewer than 2^29";
  if (c.prefix_ids.data && c.N < 1) return "prefix_ids: expected a bank of one prefix or more";
  if (c.B < 1 || c.S < 1 || c.H_kv < 1 || c.H < 1 || c.H % c.H_kv) return "shapes: expected rows, and groups of query heads";
  if (c.segments.data) return "segment_ids: expected none";
  if (c.ids_by_row && c.route == SPLIT_KV) return "route split_kv: expected one prefix a sample";
  if (int64_t{c.B} * c.H * c.S >= int64_t{1} << 30) return "shapes: expected fewer than 2^30 query rows";
  return nullptr;
}

// The call as the kernels take it. Null, or what is wrong.
inline const char* prepare_decode(const AttentionCall& call, void* workspace, DecodeParams& params) {
  const char* reason = refusal(call);
  if (reason) return reason;
  const int count = use_device(call.device, &reason);
  if (!count) return reason;
  params.call = call;
  params.plan = plan_of(call, count);
  params.by_G = divisor_of(call.H / call.H_kv);
  params.by_S = divisor_of(call.S);
  const Workspace at = workspace_of(call, params.plan);
  char* room = static_cast<char*>(workspace);
  params.acc = reinterpret_cast<float*>(room + at.acc);
  params.m = reinterpret_cast<float*>(room + at.m);
  params.l = reinterpret_cast<float*>(room + at.l);
  params.tiles = reinterpret_cast<BankTile*>(room + at.tiles);
  params.bank_units = reinterpret_cast<int*>(room + at.units);
  return nullptr;
}

}  // namespace fastprefix
