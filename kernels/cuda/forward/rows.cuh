// What the forward of any device does with its rows: q before the loop over keys, o and lse after it. A tile's rows lie in
// groups of 64, of which a lane has two each.
#pragma once

#include "decode/output.cuh"
#include "forward/visible.cuh"
#include "tiles.cuh"

namespace fastprefix {

// 64 rows of q in a tile of BLOCK_M. The running softmax wants a scale above 0: a sign is exact on q, and with a scale of
// 0 so is q itself. By 128 threads.
template <int D, int BLOCK_M>
FP_DEVICE void load_rows(uint32_t tile, const AttentionCall& c, const Divisor& by_G, const RowTile& t, int group) {
  const uint16_t* q = static_cast<const uint16_t*>(c.q.data);
  const uint32_t sign = c.scale < 0.0f ? 0x80008000u : 0u, keep = c.scale == 0.0f ? 0u : 0xffffffffu;
  FP_NO_UNROLL
  for (int i = thread_index() % 128; i < 64 * (D / 8); i += 128) {
    const int row = group * 64 + i / (D / 8), chunk = i % (D / 8);
    Bits4 bits{};
    if (t.first_row + row < t.rows && chunk * 8 < c.D)
      bits = ld_global(reinterpret_cast<const Bits4*>(q + offset(c.q, place_of(by_G, t, t.first_row + row)) + chunk * 8));
    FP_UNROLL for (int e = 0; e < 4; e++) bits.x[e] = (bits.x[e] ^ sign) & keep;
    st_shared(tile + tile_place<BLOCK_M>(row, chunk), bits);
  }
}

// The scale of logits that load_rows leaves to the softmax, base 2. It leaves none where scores are capped or get a bias.
FP_DEVICE float softmax_scale(const AttentionCall& c) {
  return c.softcap == 0.0f && c.scale != 0.0f && !c.prefix_bias ? fabsf(c.scale) * LOG2E : 1.0f;
}
template <int ELEMENTS>
FP_DEVICE void scale_and_cap(float (&x)[ELEMENTS], const Lane& me) {
  // The scale's sign is in q.
  if (me.cap != 0.0f) {
    const Logits to{fabsf(me.c.scale) / me.c.softcap, me.cap};
    FP_UNROLL for (int e = 0; e < ELEMENTS; e++) x[e] = logit(x[e], to);
  } else if (me.c.prefix_bias) {
    const float scale = fabsf(me.c.scale) * LOG2E;
    FP_UNROLL for (int e = 0; e < ELEMENTS; e++) x[e] *= scale;
  }
}

// A lane's two rows: o goes through shared memory, where the warp's rows of q were, so that whole rows are written side by
// side. No warp may read these rows of q any more.
template <class T, int D, int BLOCK_M>
FP_DEVICE void store_rows(uint32_t tile, const Lane& me, float (&o)[D / 2], float (&m)[2], float (&l)[2]) {
  const AttentionCall& c = me.c;
  const RowTile& t = me.t;
  FP_UNROLL
  for (int half = 0; half < 2; half++) {
    l[half] += shfl_xor(l[half], 1);
    l[half] += shfl_xor(l[half], 2);
    const int row = row_of_lane(me, half);
    const bool exists = row < t.rows;
    const Place place = place_of(me.by_G, t, exists ? row : t.first_row);
    const Finish end = finish(m[half] * me.scale, l[half], c.sinks, place.h);
    if (exists && me.lane % 4 == 0) st_global(c.lse + place_in_lse(c, place), end.lse);
    FP_UNROLL
    for (int j = 0; j < D / 8; j++) {
      const uint32_t two = pack<T>(o[4 * j + 2 * half] * end.weight, o[4 * j + 2 * half + 1] * end.weight);
      st_shared(tile + tile_place<BLOCK_M>(row - t.first_row, j) + me.lane % 4 * 4, static_cast<int>(two));
    }
  }
  sync_warp();   // a warp reads its own 16 rows
  FP_NO_UNROLL
  for (int i = me.lane; i < 16 * (D / 8); i += 32) {
    const int row = me.group * 64 + thread_index() / 32 % 4 * 16 + i / (D / 8), chunk = i % (D / 8);
    if (t.first_row + row >= t.rows || chunk * 8 >= c.D_v) continue;
    const Float4 eight = ld_shared4(tile + tile_place<BLOCK_M>(row, chunk));
    uint16_t* to = static_cast<uint16_t*>(c.o.data) + offset(c.o, place_of(me.by_G, t, t.first_row + row)) + chunk * 8;
    st_global(reinterpret_cast<Float4*>(to), eight);
  }
}

}  // namespace fastprefix
