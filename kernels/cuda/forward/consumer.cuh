// A consumer of the forward for sm_90a: a warpgroup with 64 rows. While its tensor cores multiply the next tile's keys and
// this tile's values, its other units compute a softmax (FlashAttention-3, Shah et al. 2024, section 3.2).
#pragma once

#include "forward/visible.cuh"
#include "hopper_wrappers.cuh"
#include "tiles.cuh"

namespace fastprefix {

template <class T, class Shared, int D, int STAGES>
struct ForwardConsumer {
  struct State {
    float o[D / 2], m[2], l[2];   // of rows accumulator_row(lane, 0 and 1) of the warp's 16; m before the scale
    int step;                     // tiles that were read
  };
  FP_DEVICE void release(uint32_t barrier) {
    if (thread_index() % 32 == 0) mbarrier_arrive(barrier);
  }

  template <int N>
  FP_DEVICE void multiply_keys(float (&x)[N / 2], uint32_t rows, uint32_t tile) {
    FP_UNROLL
    for (int step = 0; step < D / 16; step++) {
      const uint32_t panel = step / 4, columns = step % 4 * 32;
      wgmma_ss<T, false>(x, matrix_descriptor(rows + panel * (Shared::ROWS / Shared::PANELS) + columns, 16, 1024),
                     matrix_descriptor(tile + panel * N * 128 + columns, 16, 1024), step > 0);
    }
  }
  template <int N>
  FP_DEVICE void multiply_values(float (&o)[D / 2], const uint32_t (&weights)[N / 16][4], uint32_t tile) {
    FP_UNROLL
    for (int step = 0; step < N / 16; step++)
      wgmma_rs<T, true>(o, weights[step], matrix_descriptor(tile + step * 16 * 128, N * 128, 1024), true);
  }

  // `count` tiles of N keys. `see` hides keys of the next tile.
  template <int N, class See>
  FP_DEVICE void attend(State& state, const Lane& me, int count, See&& see) {
    if (count == 0) return;
    const uint32_t rows = Shared::rows() + me.group * 64 * 128;
    float x[N / 2], alpha[2];
    uint32_t weights[N / 16][4];
    mbarrier_wait(Shared::full_k(state.step % STAGES), state.step / STAGES & 1);
    wgmma_fence();
    multiply_keys<N>(x, rows, Shared::k_tile(state.step % STAGES));
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(x);
    release(Shared::empty_k(state.step % STAGES));
    see(x);
    softmax_step(x, state.m, state.l, alpha, me.scale);
    rescale(state.o, alpha);
    pack_operand<T, N>(weights, x);
    FP_NO_UNROLL
    for (int i = 1; i < count; i++) {
      const int last = state.step % STAGES, phase = state.step / STAGES & 1;
      state.step++;
      const int stage = state.step % STAGES;
      mbarrier_wait(Shared::full_k(stage), state.step / STAGES & 1);
      wgmma_fence();
      multiply_keys<N>(x, rows, Shared::k_tile(stage));
      wgmma_commit_group();
      mbarrier_wait(Shared::full_v(last), phase);
      wgmma_fence();
      multiply_values<N>(state.o, weights, Shared::v_tile(last));
      wgmma_commit_group();
      wgmma_wait_group<1>();   // the scores are there, the values still under way
      pin(x);
      release(Shared::empty_k(stage));
      see(x);
      softmax_step(x, state.m, state.l, alpha, me.scale);
      wgmma_wait_group<0>();
      pin(state.o);
      release(Shared::empty_v(last));
      rescale(state.o, alpha);
      pack_operand<T, N>(weights, x);
    }
    const int last = state.step % STAGES;
    mbarrier_wait(Shared::full_v(last), state.step / STAGES & 1);
    wgmma_fence();
    multiply_values<N>(state.o, weights, Shared::v_tile(last));
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(state.o);
    release(Shared::empty_v(last));
    state.step++;
  }
};

}  // namespace fastprefix
