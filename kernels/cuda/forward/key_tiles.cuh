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

}  // namespace fastprefix
