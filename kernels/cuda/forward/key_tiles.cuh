// Tiles of keys or values by cp.async, for kernels without the copy engine and for tiles that it cannot cut. By 128 threads;
// rows behind the end are 0.
#pragma once

#include "forward/prefixes.cuh"
#include "tiles.cuh"

namespace fastprefix {

// KEYS tokens of a prefix that has `keys`, from `first` on. By all lanes of a warp together.
template <int KEYS, int D>
FP_DEVICE void copy_prefix(uint32_t to, const AttentionCall& c, const Rows& x, int columns, int h_kv, int prefix, int first, int keys) {
  const int before = tokens_before(c, prefix);
  const int64_t at = prefix_offset(c, x, prefix, before) + int64_t{h_kv} * x.head;
  copy_tile<KEYS, D>(to, columns, x.data, [&](int i) { return first + i < keys ? element(x, at + (first + i) * x.row) : nullptr; });
}

// KEYS keys of a sample's content.
template <int KEYS, int D>
FP_DEVICE void copy_content(uint32_t to, const Rows& x, int columns, const RowTile& t, int first) {
  const int64_t at = t.b * x.batch + t.h_kv * x.head;
  copy_tile<KEYS, D>(to, columns, x.data, [&](int i) { return first + i < t.high ? element(x, at + (first + i) * x.row) : nullptr; });
}

// Where a loop over the keys of a tile of rows is: tiles of the prefixes come first.
template <class Shared, int BLOCK_P, int BLOCK_N>
struct KeyLoop {
  using Walk = PrefixWalk<Shared, BLOCK_P>;
  int step, prefix_tiles, tiles;
  Walk walk;   // of the prefixes' tiles

  FP_DEVICE KeyLoop begin(const RowTile& t) {
    KeyLoop at{0, ld_shared_int(Shared::list(1)), 0, {}};
    at.tiles = at.prefix_tiles + cdiv(t.high - t.low, BLOCK_N);
    if (at.prefix_tiles) at.walk = Walk::begin();
    return at;
  }
  FP_DEVICE void advance(KeyLoop& at) {
    if (at.step < at.prefix_tiles) Walk::advance(at.walk);
    at.step++;
  }
  FP_DEVICE int first_key(const RowTile& t, const KeyLoop& at) { return t.low + (at.step - at.prefix_tiles) * BLOCK_N; }

  // The tile of keys or of values where the loop is; behind its end nothing.
  template <int D>
  FP_DEVICE void copy(uint32_t to, const AttentionCall& c, const Rows& prefix, const Rows& content, int columns, const RowTile& t, const KeyLoop& at) {
    if (at.step < at.prefix_tiles)
      copy_prefix<BLOCK_P, D>(to, c, prefix, columns, t.h_kv, at.walk.prefix, at.walk.first, at.walk.keys);
    else if (at.step < at.tiles)
      copy_content<BLOCK_N, D>(to, content, columns, t, first_key(t, at));
  }
};

}  // namespace fastprefix
