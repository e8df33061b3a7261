// Which prefixes a tile of rows reads. A GRPO batch that is packed into one text has rows of several prompts in a tile.
#pragma once

#include "forward/row_tile.cuh"

namespace fastprefix {

constexpr int NO_PREFIX = 0x7fffffff;

FP_DEVICE int prefix_of_token(const AttentionCall& c, int b, int s) {
  if (!c.prefix_ids.data) return 0;
  const int64_t id = integer_at(c.prefix_ids, b * c.prefix_ids.batch + (c.ids_by_row ? s * c.prefix_ids.row : 0));
  return is_prefix(c, id) ? static_cast<int>(id) : -1;
}

// By one warp: the list in shared memory, in ascending order, without prefixes that have no tokens.
template <class Shared, int BLOCK_M, int BLOCK_P>
FP_DEVICE void list_prefixes(const AttentionCall& c, const Divisor& by_G, const RowTile& t) {
  const int lane = thread_index() % 32, first = quotient(t.first_row, by_G);
  const int last = quotient(smaller(t.first_row + BLOCK_M, t.rows) - 1, by_G);
  int count = 0, tiles = 0, shared_by_all = 1;
  for (int after = -2;;) {
    int next = NO_PREFIX;   // the smallest number above `after`
    for (int s = first + lane; s <= last; s += 32) {
      const int n = prefix_of_token(c, t.b, s);
      if (n > after) next = smaller(next, n);
    }
    FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) next = smaller(next, shfl_idx(next, lane ^ mask));
    if (next == NO_PREFIX) break;
    // A second kind of row, be it rows without a prefix, and no prefix is every row's.
    if (after != -2) shared_by_all = 0;
    after = next;
    const int keys = prefix_keys(c, next, tokens_before(c, next));
    if (keys > 0) {
      if (lane == 0) {
        st_shared(Shared::list(4 + 2 * count), next);
        st_shared(Shared::list(5 + 2 * count), keys);
      }
      count++;
      tiles += cdiv(keys, BLOCK_P);
    }
    if (!c.ids_by_row) break;
  }
  if (lane == 0) {
    st_shared(Shared::list(0), count);
    st_shared(Shared::list(1), tiles);
    st_shared(Shared::list(2), shared_by_all);
  }
}

// Goes through the list tile by tile; the producer and every consumer go the same way.
template <class Shared, int BLOCK_P>
struct PrefixWalk {
  int entry, prefix, keys, first;

  FP_DEVICE PrefixWalk begin() { return {0, ld_shared_int(Shared::list(4)), ld_shared_int(Shared::list(5)), 0}; }
  FP_DEVICE void advance(PrefixWalk& at) {
    at.first += BLOCK_P;
    if (at.first < at.keys) return;
    at.entry++;
    at.first = 0;
    if (at.entry >= ld_shared_int(Shared::list(0))) return;
    at.prefix = ld_shared_int(Shared::list(4 + 2 * at.entry));
    at.keys = ld_shared_int(Shared::list(5 + 2 * at.entry));
  }
};

}  // namespace fastprefix
