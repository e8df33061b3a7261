// The keys that a tile's rows see of a packed text: from the first to the last that is of any of their segments. Rows of a
// short document walk its keys alone. Ids are compared, not searched, for they need not be sorted.
#pragma once

#include "forward/row_tile.cuh"

namespace fastprefix {

struct Bounds {
  int least, most;
};

// The bounds of all threads' bounds. `room` has two words a warp, which nothing else uses.
template <int WARPS>
FP_DEVICE Bounds bounds_of_block(Bounds x, uint32_t room) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  FP_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    x.least = smaller(x.least, shfl_idx(x.least, lane ^ mask));
    x.most = larger(x.most, shfl_idx(x.most, lane ^ mask));
  }
  if (lane == 0) {
    st_shared(room + warp * 8, x.least);
    st_shared(room + warp * 8 + 4, x.most);
  }
  sync_block();
  FP_UNROLL
  for (int i = 0; i < WARPS; i++) {
    x.least = smaller(x.least, ld_shared_int(room + i * 8));
    x.most = larger(x.most, ld_shared_int(room + i * 8 + 4));
  }
  return x;
}

// By all threads of the block together.
template <class Shared, int BLOCK_M, int THREADS>
FP_DEVICE void find_segments(const AttentionCall& c, RowTile& t) {
  if (!c.segments.data || c.T == 0) return;
  constexpr int NONE = 0x7fffffff, WARPS = THREADS / 32;
  Bounds ids{NONE, -NONE};
  const int position = t.first_position + thread_index();
  if (thread_index() < BLOCK_M && position <= t.last_position) ids.least = ids.most = segment_in_bounds(segment_at(c, t.b, position));
  ids = bounds_of_block<WARPS>(ids, Shared::segment_room());
  t.least_segment = ids.least;
  t.most_segment = ids.most;
  Bounds keys{NONE, -NONE};
  FP_NO_UNROLL
  for (int key = t.low + thread_index(); key < t.high; key += THREADS) {
    const int id = segment_in_bounds(segment_at(c, t.b, key));
    if (id >= ids.least && id <= ids.most) keys = {smaller(keys.least, key), key};
  }
  keys = bounds_of_block<WARPS>(keys, Shared::segment_room() + 8 * WARPS);
  t.low = smaller(t.high, larger(t.low, keys.least));
  t.high = larger(t.low, smaller(t.high, keys.most + 1));
}

}  // namespace fastprefix
