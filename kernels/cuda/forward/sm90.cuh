// Forward for sm_90a: prefix and content in one loop over tiles, which one warp fetches by the copy engine for two
// warpgroups that multiply by wgmma (FlashAttention-3, Shah et al. 2024, with two sources of keys).
//
// BLOCK_P is the width of a tile of the prefix: a short prefix is worth a matrix product of 16 keys, not one of 128. Head
// dims below D are filled with zeros: by the copy engine, and in the rows of q.
#pragma once

#include "decode/output.cuh"
#include "forward/consumer.cuh"
#include "forward/producer.cuh"
#include "forward/segments.cuh"

namespace fastprefix {

template <class T, int D, int BLOCK_P>
struct ForwardSm90 {
  using Params = ForwardParams;
  static constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1), BLOCK_M = 64 * GROUPS, BLOCK_N = 128, STAGES = 2;
  static constexpr int BLOCKS_PER_SM = 1, CONSUMER_WARPS = 4 * GROUPS;
  using Shared = ForwardShared<D, BLOCK_M, BLOCK_N, STAGES>;
  using Producer = ForwardProducer<Shared, D, BLOCK_N, BLOCK_P, STAGES>;
  using Consumer = ForwardConsumer<T, Shared, D, STAGES>;
  static constexpr uint32_t SHARED_BYTES = Shared::BYTES;

  static int64_t blocks(const ForwardParams& p) { return int64_t{p.call.B} * p.call.H_kv * p.tiles; }

  // The group's 64 rows of q, as wgmma reads them. The running softmax wants a scale above 0: a sign is exact on q, and
  // with a scale of 0 so is q itself.
  FP_DEVICE void load_rows(const ForwardParams& p, const RowTile& t, int group) {
    const uint16_t* q = static_cast<const uint16_t*>(p.call.q.data);
    const float scale = p.call.scale;
    const uint32_t sign = scale < 0.0f ? 0x80008000u : 0u, keep = scale == 0.0f ? 0u : 0xffffffffu;
    FP_NO_UNROLL
    for (int i = thread_index() % 128; i < 64 * (D / 8); i += 128) {
      const int row = group * 64 + i / (D / 8), chunk = i % (D / 8);
      Bits4 bits{};
      if (t.first_row + row < t.rows && chunk * 8 < p.call.D)
        bits = ld_global(reinterpret_cast<const Bits4*>(q + offset(p.call.q, place_of(p.by_G, t, t.first_row + row)) + chunk * 8));
      FP_UNROLL for (int e = 0; e < 4; e++) bits.x[e] = (bits.x[e] ^ sign) & keep;
      st_shared(Shared::rows() + chunk / 8 * (BLOCK_M * 128) + panel_offset(row, chunk % 8), bits);
    }
    fence_proxy_async();
    sync_group(group);
  }

  FP_DEVICE void sync_group(int group) {
    static_assert(GROUPS == 2);
    // Numbers that the compiler knows: for any other it would reserve all barriers.
    if (group == 0)
      bar_sync(1, 128);
    else
      bar_sync(2, 128);
  }

  template <int ELEMENTS>
  FP_DEVICE void cap_logits(float (&x)[ELEMENTS], const Lane& me) {
    if (me.cap == 0.0f) return;
    const Logits to{fabsf(me.c.scale) / me.c.softcap, me.cap};   // its sign is in q
    FP_UNROLL for (int e = 0; e < ELEMENTS; e++) x[e] = logit(x[e], to);
  }

  FP_DEVICE void consume(const ForwardParams& p, const RowTile& t, int group) {
    load_rows(p, t, group);
    const AttentionCall& c = p.call;
    const bool scaled = c.softcap == 0.0f && c.scale != 0.0f;
    const Lane me{c, p.by_G, t, thread_index() % 32, group, scaled ? fabsf(c.scale) * LOG2E : 1.0f, c.softcap * LOG2E};
    typename Consumer::State state;
    FP_UNROLL for (int e = 0; e < D / 2; e++) state.o[e] = 0.0f;
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      state.m[half] = NEGATIVE_INFINITY;
      state.l[half] = 0.0f;
    }
    state.step = 0;
    const int prefix_tiles = ld_shared_int(Shared::list(1)), shared_by_all = ld_shared_int(Shared::list(2));
    using Walk = PrefixWalk<Shared, BLOCK_P>;
    Walk walk{};
    if (prefix_tiles) walk = Walk::begin();
    Consumer::template attend<BLOCK_P>(state, me, prefix_tiles, [&](float(&x)[BLOCK_P / 2]) {
      cap_logits(x, me);
      hide_prefix(x, me, walk.prefix, walk.first, walk.keys, shared_by_all);
      Walk::advance(walk);
    });
    int first = t.low;
    Consumer::template attend<BLOCK_N>(state, me, cdiv(t.high - t.low, BLOCK_N), [&](float(&x)[BLOCK_N / 2]) {
      cap_logits(x, me);
      hide_content(x, me, first);
      first += BLOCK_N;
    });
    store(p, t, me, state);
  }

  // o goes through shared memory, where the group's rows of q were, so that whole rows are written side by side.
  FP_DEVICE void store(const ForwardParams& p, const RowTile& t, const Lane& me, typename Consumer::State& state) {
    const AttentionCall& c = p.call;
    sync_group(me.group);   // every warp's products with q are done
    FP_UNROLL
    for (int half = 0; half < 2; half++) {
      state.l[half] += shfl_xor(state.l[half], 1);
      state.l[half] += shfl_xor(state.l[half], 2);
      const int row = row_of_lane(me, half);
      const bool exists = row < t.rows;
      const Place place = place_of(p.by_G, t, exists ? row : t.first_row);
      const Finish end = finish(state.m[half] * me.scale, state.l[half], c.sinks, place.h);
      if (exists && me.lane % 4 == 0) st_global(c.lse + place_in_lse(c, place), end.lse);
      FP_UNROLL
      for (int j = 0; j < D / 8; j++) {
        const uint32_t two = pack<T>(state.o[4 * j + 2 * half] * end.weight, state.o[4 * j + 2 * half + 1] * end.weight);
        st_shared(Shared::rows() + j / 8 * (BLOCK_M * 128) + panel_offset(row - t.first_row, j % 8) + me.lane % 4 * 4, static_cast<int>(two));
      }
    }
    sync_warp();   // a warp reads its own 16 rows
    FP_NO_UNROLL
    for (int i = me.lane; i < 16 * (D / 8); i += 32) {
      const int row = me.group * 64 + thread_index() / 32 % 4 * 16 + i / (D / 8), chunk = i % (D / 8);
      if (t.first_row + row >= t.rows || chunk * 8 >= c.D_v) continue;
      const Float4 eight = ld_shared4(Shared::rows() + chunk / 8 * (BLOCK_M * 128) + panel_offset(row, chunk % 8));
      uint16_t* o = static_cast<uint16_t*>(c.o.data) + offset(c.o, place_of(p.by_G, t, t.first_row + row)) + chunk * 8;
      st_global(reinterpret_cast<Float4*>(o), eight);
    }
  }

  FP_DEVICE void run(const ForwardParams& p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)   // other devices' binaries have no such instructions
    RowTile t = row_tile<BLOCK_M>(p.call, p.by_G, p.tiles);
    const int warp = thread_index() / 32;
    if (thread_index() == 0) {
      FP_UNROLL
      for (int stage = 0; stage < STAGES; stage++) {
        mbarrier_init(Shared::full_k(stage), 1);
        mbarrier_init(Shared::full_v(stage), 1);
        mbarrier_init(Shared::empty_k(stage), CONSUMER_WARPS);
        mbarrier_init(Shared::empty_v(stage), CONSUMER_WARPS);
      }
      fence_mbarrier_init();
    }
    if (warp == 1) list_prefixes<Shared, BLOCK_M, BLOCK_P>(p.call, p.by_G, t);
    find_segments<Shared, BLOCK_M, THREADS>(p.call, t);
    sync_block();   // barriers and list are there
    if (warp < 4) {
      setmaxnreg_dec<40>();
      if (warp == 0) Producer::run(p, t);
    } else {
      setmaxnreg_inc<232>();
      consume(p, t, warp / 4 - 1);
    }
#else
    trap();   // a library that was built for other devices must not leave o as it was
#endif
  }
};

}  // namespace fastprefix
