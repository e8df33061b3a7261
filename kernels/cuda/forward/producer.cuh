// The producer of the forward for sm_90a: one warp that keeps the stages of keys and values filled, first from the prefix,
// then from the content, in one sequence of tiles that the consumers read in the same order.
#pragma once

#include "forward/prefixes.cuh"
#include "forward/shared.cuh"

namespace fastprefix {

template <class Shared, int D, int BLOCK_N, int BLOCK_P, int STAGES>
struct ForwardProducer {
  // Tile number `step`: waits until the consumers have left its stage.
  FP_DEVICE void wait_empty(uint32_t barrier, int step) { mbarrier_wait(barrier, ((step / STAGES) & 1) ^ 1); }

  // A box of KEYS keys by the copy engine, 64 columns at a time. What lies outside of the tensor becomes 0.
  template <int KEYS>
  FP_DEVICE void copy_box(uint32_t to, uint32_t full, const TensorMap* x, const Rows& strides, int first, int h, int b) {
    if (strides.head == 0) h = 0;   // an expanded dimension has size 1 in the map
    if (strides.batch == 0) b = 0;
    mbarrier_arrive_expect_tx(full, KEYS * D * 2);
    FP_UNROLL
    for (int panel = 0; panel < D / 64; panel++) tma_load_4d(to + panel * KEYS * 128, x, full, panel * 64, first, h, b);
  }

  // The last tile of a prefix that ends before its tensor does: what follows is another prefix's, or was never written,
  // and a weight of 0 does not hide a nan. By the lanes themselves.
  FP_DEVICE void copy_rows(uint32_t to, uint32_t full, const Rows& x, int64_t from, int keys, int columns) {
    const int lane = thread_index() % 32;
    const uint16_t* rows = static_cast<const uint16_t*>(x.data) + from;
    FP_NO_UNROLL
    for (int i = lane; i < BLOCK_P * (D / 8); i += 32) {
      const int row = i / (D / 8), chunk = i % (D / 8);
      const bool inside = row < keys && chunk * 8 < columns;
      cp_async_16(to + tile_place<BLOCK_P>(row, chunk), inside ? rows + row * x.row + chunk * 8 : rows, inside ? 16 : 0);
    }
    cp_async_commit_group();
    cp_async_wait_group<0>();
    fence_proxy_async();   // wgmma reads by another proxy than these lanes write
    sync_warp();
    if (lane == 0) mbarrier_arrive(full);
  }

  // All lanes take this way together; what is issued once is issued by lane 0.
  FP_DEVICE void run(const ForwardParams& p, const RowTile& t) {
    const AttentionCall& c = p.call;
    const bool first_lane = thread_index() % 32 == 0;
    const int prefix_tiles = ld_shared_int(Shared::list(1)), content_tiles = cdiv(t.high - t.low, BLOCK_N);
    using Walk = PrefixWalk<Shared, BLOCK_P>;
    Walk walk{};
    if (prefix_tiles) walk = Walk::begin();
    int entry = -1;
    int before = 0;
    FP_NO_UNROLL
    for (int step = 0; step < prefix_tiles; step++) {
      const int stage = step % STAGES, keys = smaller(BLOCK_P, walk.keys - walk.first);
      if (entry != walk.entry) {
        entry = walk.entry;
        before = tokens_before(c, walk.prefix);
      }
      const bool by_rows = c.prefix_lens.data && keys < BLOCK_P;
      // A packed bank is to the copy engine one prefix, in which this one begins somewhere.
      const int first = walk.first + before, n = c.packed ? 0 : walk.prefix;
      const int64_t row = walk.first, h = t.h_kv;
      const int64_t begin_k = prefix_offset(c, c.prefix_k, walk.prefix, before), begin_v = prefix_offset(c, c.prefix_v, walk.prefix, before);
      wait_empty(Shared::empty_k(stage), step);
      if (by_rows)
        copy_rows(Shared::k_tile(stage), Shared::full_k(stage), c.prefix_k, begin_k + h * c.prefix_k.head + row * c.prefix_k.row, keys, c.D);
      else if (first_lane)
        copy_box<BLOCK_P>(Shared::k_tile(stage), Shared::full_k(stage), &p.prefix_k, c.prefix_k, first, t.h_kv, n);
      wait_empty(Shared::empty_v(stage), step);
      if (by_rows)
        copy_rows(Shared::v_tile(stage), Shared::full_v(stage), c.prefix_v, begin_v + h * c.prefix_v.head + row * c.prefix_v.row, keys, c.D_v);
      else if (first_lane)
        copy_box<BLOCK_P>(Shared::v_tile(stage), Shared::full_v(stage), &p.prefix_v, c.prefix_v, first, t.h_kv, n);
      Walk::advance(walk);
    }
    if (!first_lane) return;
    FP_NO_UNROLL
    for (int i = 0; i < content_tiles; i++) {
      const int step = prefix_tiles + i, stage = step % STAGES, first = t.low + i * BLOCK_N;
      wait_empty(Shared::empty_k(stage), step);
      copy_box<BLOCK_N>(Shared::k_tile(stage), Shared::full_k(stage), &p.k, c.k, first, t.h_kv, t.b);
      wait_empty(Shared::empty_v(stage), step);
      copy_box<BLOCK_N>(Shared::v_tile(stage), Shared::full_v(stage), &p.v, c.v, first, t.h_kv, t.b);
    }
  }
};

}  // namespace fastprefix
