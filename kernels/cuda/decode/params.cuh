// What the kernels of decoding are launched with, and which rows and keys a block has.
//
// Query rows are packed, the query heads of a group side by side: row r of a sample is token r / G and head r % G of the
// group, so that a tile of keys is multiplied with the whole group. Against the prefix, which has no batch, the rows of all
// samples that read it are packed: a unit is a sample (S tokens) or, where rows have prefixes of their own, a token.
#pragma once

#include "attention_call.h"
#include "layouts.cuh"

namespace fastprefix {

// How a call is cut into blocks. The states of running softmaxes lie in slots, the prefix's splits first.
struct DecodePlan {
  Route route;
  int prefix_warps, content_warps;     // warps over the rows of a tile, which has 16 times as many rows
  int prefix_tiles, prefix_splits;     // tiles of rows for one key/value head; 0 splits: no blocks
  int content_tiles, content_splits;   // tiles of rows for one sample and key/value head
  int units;                           // of a bank: how many ids there are; else 0
  int64_t rows;                        // B * H * S
  bool direct;                         // one split alone: its block writes o and lse
};

// A tile of rows that read one prefix, as the bank's kernel lists them; prefix -1 is no tile.
struct alignas(16) BankTile {
  int prefix, first_row, rows, first_unit;
};

struct DecodeParams {
  AttentionCall call;
  DecodePlan plan;
  Divisor by_G, by_S;
  float* acc;         // [slots, B * H * S, D_v], not normalised
  float* m;           // [slots, B * H * S], base 2
  float* l;           // [slots, B * H * S]
  BankTile* tiles;    // [prefix_tiles], of a bank
  int* bank_units;    // [units], by prefix
  int* bank_first;    // [N + 1], or null: where each prefix's units begin; then there are no tiles
};

FP_DEVICE int64_t integer_at(const Integers& x, int64_t place) {
  return x.bytes == 8 ? ld_global(static_cast<const int64_t*>(x.data) + place)
                      : ld_global(static_cast<const int32_t*>(x.data) + place);
}

// A position far outside of every cache stays one, and can be added to.
FP_DEVICE int bounded(int64_t position) {
  constexpr int64_t FAR = int64_t{1} << 30;
  return static_cast<int>(position < -FAR ? -FAR : position > FAR ? FAR : position);
}

// Tokens of a prefix, 0 of none. The ids were checked by the host only if it could see them.
FP_DEVICE bool is_prefix(const AttentionCall& c, int64_t id) { return id >= 0 && id < c.N; }
// The prefix of an id, -1 for none.
FP_DEVICE int prefix_of_id(const AttentionCall& c, int64_t id) { return is_prefix(c, id) ? static_cast<int>(id) : -1; }
FP_DEVICE int prefix_length(const AttentionCall& c, int n) {
  if (!is_prefix(c, n)) return 0;
  if (!c.prefix_lens.data) return c.P;
  const int64_t length = integer_at(c.prefix_lens, n * c.prefix_lens.batch);
  return length < 0 ? 0 : static_cast<int>(length < c.P ? length : c.P);
}

// How many tokens of a packed bank lie before a prefix; 0 in any other. By all lanes of a warp together.
FP_DEVICE int tokens_before(const AttentionCall& c, int n) {
  if (!c.packed) return 0;
  int before = 0;
  for (int i = thread_index() % 32; i < n; i += 32) before += prefix_length(c, i);
  FP_UNROLL
  for (int lane = 16; lane > 0; lane /= 2) before += shfl_idx(before, (thread_index() % 32) ^ lane);
  return before;
}

// How many tokens of a prefix there are: no more than the bank has, whatever lengths say that the host could not see.
FP_DEVICE int prefix_keys(const AttentionCall& c, int n, int before) {
  return smaller(prefix_length(c, n), c.packed ? larger(0, c.P - before) : c.P);
}

// Where a prefix begins in the bank's keys or values.
FP_DEVICE int64_t prefix_offset(const AttentionCall& c, const Rows& x, int n, int before) {
  return c.packed ? before * x.row : n * x.batch;
}

// Where the bias of a prefix's tokens begins for a key/value head.
FP_DEVICE const float* bias_of_prefix(const AttentionCall& c, int n, int before, int h_kv) {
  return c.prefix_bias + (c.packed ? int64_t{h_kv} * c.P + before : (int64_t{n} * c.H_kv + h_kv) * c.P);
}
// A token's, as a base-2 logit. A nan hides the token, too.
FP_DEVICE float bias_at(const float* bias, int token) {
  const float natural = ld_global(bias + token);
  return natural > MASKED_BIAS ? natural * LOG2E : NEGATIVE_INFINITY;
}

// A row of the call: sample, token, query head.
struct Place {
  int b, s, h;
};
FP_DEVICE int64_t place_in_lse(const AttentionCall& c, const Place& at) {
  return (static_cast<int64_t>(at.b) * c.H + at.h) * c.S + at.s;
}
FP_DEVICE int64_t offset(const Rows& x, const Place& at) { return at.b * x.batch + at.h * x.head + at.s * x.row; }

// What one block does: a tile of rows against one share of the key tiles that they see.
struct Task {
  bool of_prefix;              // rows of the whole batch, or of sample b alone
  int b, h_kv;
  int first_row, rows;         // the tile's first row, and how many rows there are in all
  int first_unit;              // of a bank
  int prefix, prefix_keys;     // which prefix, and how many of its tokens are read: 0 where other blocks do that
  int low, high;               // content keys that any of the tile's rows may see
  int start;                   // content position of token 0
  int split, splits, slot;
};

FP_DEVICE Place place_of(const DecodeParams& p, const Task& task, int row) {
  const AttentionCall& c = p.call;
  const int G = static_cast<int>(p.by_G.divisor), token = quotient(row, p.by_G);
  const int h = task.h_kv * G + remainder(row, token, p.by_G);
  if (!task.of_prefix) return {task.b, token, h};
  int sample = quotient(token, p.by_S), s = remainder(token, sample, p.by_S);
  if (p.plan.units) {
    if (c.ids_by_row) {
      const int unit = ld_global(p.bank_units + task.first_unit + token);
      sample = quotient(unit, p.by_S);
      s = remainder(unit, sample, p.by_S);
    } else {
      sample = ld_global(p.bank_units + task.first_unit + sample);
    }
  }
  return {sample, s, h};
}

// Blocks of the prefix come first: those of one share of it, which read the same keys, side by side.
FP_DEVICE int prefix_blocks(const DecodeParams& p) {
  return p.plan.prefix_splits * p.call.H_kv * p.plan.prefix_tiles;
}

FP_DEVICE Task prefix_task(const DecodeParams& p, int block, int tile_rows) {
  const AttentionCall& c = p.call;
  const int tile = block % p.plan.prefix_tiles, rest = block / p.plan.prefix_tiles;
  Task task{};
  task.of_prefix = true;
  task.h_kv = rest % c.H_kv;
  task.split = task.slot = rest / c.H_kv;
  task.splits = p.plan.prefix_splits;
  if (p.plan.units) {
    const BankTile found = ld_global(p.tiles + tile);
    task.prefix = found.prefix;
    task.first_row = found.first_row;
    task.rows = found.rows;
    task.first_unit = found.first_unit;
  } else {
    task.first_row = tile * tile_rows;
    task.rows = c.B * c.S * static_cast<int>(p.by_G.divisor);
  }
  task.prefix_keys = prefix_length(c, task.prefix);
  return task;
}

FP_DEVICE Task content_task(const DecodeParams& p, int block, int tile_rows) {
  const AttentionCall& c = p.call;
  const int tile = block % p.plan.content_tiles;
  int rest = block / p.plan.content_tiles;
  Task task{};
  task.split = rest % p.plan.content_splits;
  rest /= p.plan.content_splits;
  task.splits = p.plan.content_splits;
  task.slot = p.plan.prefix_splits + task.split;
  task.h_kv = rest % c.H_kv;
  task.b = rest / c.H_kv;
  task.first_row = tile * tile_rows;
  task.rows = c.S * static_cast<int>(p.by_G.divisor);
  task.start = bounded(c.q_start.data ? integer_at(c.q_start, task.b * c.q_start.batch) : c.start);
  if (p.plan.route == SPLIT_KV) {
    task.prefix = c.prefix_ids.data ? prefix_of_id(c, integer_at(c.prefix_ids, task.b * c.prefix_ids.batch)) : 0;
    task.prefix_keys = prefix_length(c, task.prefix);
  }
  const int first = task.start + quotient(task.first_row, p.by_G);
  const int last = task.start + quotient(smaller(task.first_row + tile_rows, task.rows) - 1, p.by_G);
  task.low = c.window ? larger(0, first - c.window + 1) : 0;
  // Slots of a cache behind the last row's own may never have been written and are not read.
  task.high = larger(task.low, c.causal ? smaller(c.T, last + 1) : c.T);
  return task;
}

}  // namespace fastprefix
