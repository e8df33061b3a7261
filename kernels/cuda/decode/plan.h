// How a call of decoding is cut, by its shapes alone: which route, tiles of rows, shares of keys, and its workspace.
#pragma once

#include <algorithm>

#include "decode/params.cuh"

namespace fastprefix {

// Bytes and operations that one multiprocessor gets done in a microsecond, and what a launch costs. Estimates for an H100;
// an A100's and an Ada's ratios are near enough. `fastprefix verify` measures both routes and overrules what follows.
struct Rates {
  double memory = 25e3;       // bytes from memory, a multiprocessor's share
  double cache = 45e3;        // bytes from the second-level cache
  double tensor = 4e6;        // operations of mma.sync
  double launch = 2.0;        // microseconds
};
// A multiprocessor holds two blocks or three: so many shares fill it.
constexpr int BLOCKS_A_MULTIPROCESSOR = 2;
// Sharing has to promise this much less time before it is preferred: what the estimates are not good for.
constexpr double GAIN = 0.95;
// Beyond this the states cost more than the shares save.
constexpr int MOST_SPLITS = 128;

inline int tile_width(const AttentionCall& c) {
  const int widest = std::max(c.D, c.D_v);
  return widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
}
inline int keys_of_tile(const AttentionCall& c) { return 8192 / tile_width(c); }

// Content keys that a row sees at most, as far as the host knows.
inline int64_t visible_keys(const AttentionCall& c) {
  int64_t keys = c.T;
  if (c.causal && !c.q_start.data) keys = std::max<int64_t>(0, std::min(keys, c.start + c.S));
  return c.window ? std::min<int64_t>(keys, int64_t{c.window} + c.S - 1) : keys;
}

// How many prefixes can have rows.
inline int prefixes_in_use(const AttentionCall& c) {
  return c.prefix_ids.data ? std::min(c.N, c.ids_by_row ? c.B * c.S : c.B) : 1;
}

// Rows of a tile, 16 to a warp: no more than there are, and at 256 columns no more than registers hold.
inline int warps_for(const AttentionCall& c, int64_t rows) { return rows <= 16 ? 1 : tile_width(c) == 256 ? 2 : 4; }

// Microseconds that each route is estimated to take.
struct Estimate {
  double split_kv, cascade;
};
inline Estimate estimate(const AttentionCall& c, int multiprocessors) {
  const Rates rate;
  const double sms = multiprocessors, head_bytes = 2.0 * (c.D + c.D_v), head_flops = 2.0 * (c.D + c.D_v);
  const int64_t group = c.H / c.H_kv, sample_rows = c.S * group, used = prefixes_in_use(c), all_rows = c.B * sample_rows;
  const int64_t sample_tile = 16 * warps_for(c, sample_rows), prefix_tile = 16 * warps_for(c, all_rows / used);
  const double sample_tiles = cdiv(sample_rows, sample_tile), prefix_tiles = used * cdiv(cdiv(all_rows, used), prefix_tile);
  // Of a packed bank, P is the length of all.
  const double tokens = static_cast<double>(c.P) / (c.packed ? std::max(c.N, 1) : 1), keys = visible_keys(c);
  const double content_bytes = c.B * c.H_kv * keys * head_bytes, prefix_bytes = used * c.H_kv * tokens * head_bytes;
  const auto time = [&](double memory, double cache, double flops) {
    return std::max({memory / (rate.memory * sms), cache / (rate.cache * sms), flops / (rate.tensor * sms)});
  };
  const double content_flops = sample_tiles * sample_tile * c.B * c.H_kv * keys * head_flops;
  // Every tile of rows reads its prefix, all but the first from the cache: tiles of one sample, or of the whole batch.
  const auto with_prefix = [&](double tiles, double rows) {
    const double of_prefix = tiles * c.H_kv * tokens;
    return time(content_bytes + prefix_bytes, content_bytes + of_prefix * head_bytes, content_flops + of_prefix * rows * head_flops);
  };
  const double split_kv = with_prefix(sample_tiles * c.B, sample_tile), cascade = with_prefix(prefix_tiles, prefix_tile);
  // The states: those of the content are left by both routes where they split, those of the prefix by one.
  const double states = 2.0 * 4.0 * c.B * c.H * c.S * (c.D_v + 2.0) / (rate.cache * sms);
  const bool split_kv_is_one = c.B * c.H_kv >= BLOCKS_A_MULTIPROCESSOR * multiprocessors;
  return {split_kv + (split_kv_is_one ? 0.0 : rate.launch),
          cascade + 2.0 * states + rate.launch + (c.prefix_ids.data ? rate.launch : 0.0)};
}

inline Route route_of(const AttentionCall& c, int multiprocessors) {
  if (c.ids_by_row) return CASCADE;   // rows of a sample read prefixes of their own
  if (c.route != AUTO) return c.route;
  const Estimate time = estimate(c, multiprocessors);
  return c.P > 0 && time.cascade < GAIN * time.split_kv ? CASCADE : SPLIT_KV;
}

inline DecodePlan plan_of(const AttentionCall& c, int multiprocessors) {
  DecodePlan plan{};
  plan.route = route_of(c, multiprocessors);
  const int64_t sample_rows = int64_t{c.S} * (c.H / c.H_kv), all_rows = c.B * sample_rows, block_n = keys_of_tile(c);
  const int used = prefixes_in_use(c);
  plan.rows = int64_t{c.B} * c.H * c.S;
  plan.content_warps = warps_for(c, sample_rows);
  plan.prefix_warps = std::max(plan.content_warps, warps_for(c, cdiv(all_rows, used)));
  plan.content_tiles = static_cast<int>(cdiv(sample_rows, 16 * plan.content_warps));

  int64_t prefix_keys = 0, content_keys = cdiv(visible_keys(c), block_n);   // in tiles
  if (plan.route == CASCADE && c.P > 0) {
    if (c.prefix_ids.data) plan.units = c.ids_by_row ? c.B * c.S : c.B;
    // Each prefix in use may end in a tile that is not full.
    plan.prefix_tiles = static_cast<int>((all_rows - used) / (16 * plan.prefix_warps) + used);
    prefix_keys = cdiv(c.P, block_n);
  } else {
    content_keys += cdiv(c.P, block_n);
  }
  // Shares of one length for all blocks, such that they fill the machine; each has one tile of keys or more.
  const int64_t prefix_rows = int64_t{plan.prefix_tiles} * c.H_kv, content_rows = int64_t{c.B} * c.H_kv * plan.content_tiles;
  const int64_t work = prefix_rows * prefix_keys + content_rows * content_keys;
  const int64_t share = std::max<int64_t>(1, cdiv(work, int64_t{BLOCKS_A_MULTIPROCESSOR} * multiprocessors));
  const auto splits = [&](int64_t keys) { return static_cast<int>(std::min<int64_t>(cdiv(keys, share), MOST_SPLITS)); };
  plan.prefix_splits = splits(prefix_keys);
  plan.content_splits = plan.prefix_splits ? splits(content_keys) : std::max(1, splits(content_keys));
  plan.direct = plan.prefix_splits + plan.content_splits == 1 && plan.prefix_splits == 0;
  return plan;
}

// Where each part of the workspace begins, in bytes; all are multiples of 16.
struct Workspace {
  int64_t acc, m, l, tiles, units, bytes;
};
inline Workspace workspace_of(const AttentionCall& c, const DecodePlan& plan) {
  const int64_t states = plan.direct ? 0 : plan.rows * (plan.prefix_splits + plan.content_splits);
  const int64_t sizes[] = {states * c.D_v * 4, states * 4, states * 4, plan.units ? plan.prefix_tiles * 16 : 0, plan.units * 4};
  int64_t begins[6] = {0};
  for (int i = 0; i < 5; i++) begins[i + 1] = begins[i] + cdiv(sizes[i], 16) * 16;
  return {begins[0], begins[1], begins[2], begins[3], begins[4], begins[5]};
}

}  // namespace fastprefix
