// Products of a warp with tiles in shared memory by mma.sync. An accumulator of 16 rows and N columns lies in a lane as a
// warp's share of wgmma's does: N / 2 numbers.
#pragma once

#include "tiles.cuh"

namespace fastprefix {

// The A operand of one step of 16 columns, from 16 rows of a tile.
template <int ROWS>
FP_DEVICE void load_operand(uint32_t (&a)[4], uint32_t tile, int first, int step, int lane) {
  ldmatrix_x4(a, tile + tile_place<ROWS>(first + lane_row_by_rows(lane), step * 2 + lane_chunk_by_rows(lane)));
}

template <class T, int ELEMENTS>
FP_DEVICE void mma_at(float (&x)[ELEMENTS], int at, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float c[4] = {x[at], x[at + 1], x[at + 2], x[at + 3]};
  mma_m16n8k16<T>(c, a, b0, b1);
  FP_UNROLL for (int e = 0; e < 4; e++) x[at + e] = c[e];
}

// x = a b^T of M times 16 rows: b has N rows of a tile of ROWS from `first` on, and D columns. `load` gives the A operands
// of a step of 16 columns.
template <class T, int D, int N, int ROWS, int M, class Load>
FP_DEVICE void multiply_by_rows(float (&x)[M][N / 2], uint32_t tile, int first, int lane, Load&& load) {
  FP_UNROLL
  for (int m = 0; m < M; m++) FP_UNROLL for (int e = 0; e < N / 2; e++) x[m][e] = 0.0f;
  FP_UNROLL
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[M][4];
    load(a, step);
    FP_UNROLL
    for (int j = 0; j < N / 16; j++) {
      uint32_t b[4];
      ldmatrix_x4(b, tile + tile_place<ROWS>(first + j * 16 + lane_row_by_columns(lane), step * 2 + lane_chunk_by_columns(lane)));
      FP_UNROLL
      for (int m = 0; m < M; m++) {
        mma_at<T>(x[m], 8 * j, a[m], b[0], b[1]);
        mma_at<T>(x[m], 8 * j + 4, a[m], b[2], b[3]);
      }
    }
  }
}

// sum += a b of M times 16 rows: a has N columns, b N rows of a tile of ROWS from `first` on, and D columns.
template <class T, int D, int N, int ROWS, int M>
FP_DEVICE void add_product(float (&sum)[M][D / 2], const uint32_t (&a)[M][N / 16][4], uint32_t tile, int first, int lane) {
  FP_UNROLL
  for (int step = 0; step < N / 16; step++) {
    FP_UNROLL
    for (int j = 0; j < D / 16; j++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile + tile_place<ROWS>(first + step * 16 + lane_row_by_rows(lane), j * 2 + lane_chunk_by_rows(lane)));
      FP_UNROLL
      for (int m = 0; m < M; m++) {
        mma_at<T>(sum[m], 8 * j, a[m][step], b[0], b[1]);
        mma_at<T>(sum[m], 8 * j + 4, a[m][step], b[2], b[3]);
      }
    }
  }
}

}  // namespace fastprefix
