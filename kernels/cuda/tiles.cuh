// Tiles in shared memory in panels of 64 columns, and accumulators as operands.
//
// A panel's row has 128 bytes, in the swizzle that the copy engine writes and that wgmma and ldmatrix read without two
// rows in one bank.
#pragma once

#include "layouts.cuh"

namespace fastprefix {

FP_CONSTEXPR uint32_t panel_offset(int row, int chunk) { return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4)); }

// Where a chunk of 8 elements is in a tile of ROWS rows.
template <int ROWS>
FP_CONSTEXPR uint32_t tile_place(int row, int chunk) { return chunk / 8 * (ROWS * 128) + panel_offset(row, chunk % 8); }

// A tile of ROWS rows and D columns by cp.async, 0 where there is none: `at` gives the address of a row, or null. By 128
// threads.
template <int ROWS, int D, class At>
FP_DEVICE void copy_tile(uint32_t to, int columns, const void* anything, At&& at) {
  constexpr int CHUNKS = D / 8, STEP = 128 / CHUNKS;
  const int thread = thread_index_again() % 128, chunk = thread % CHUNKS;
  FP_NO_UNROLL
  for (int row = thread / CHUNKS; row < ROWS; row += STEP) {
    const uint16_t* from = at(row);
    const bool inside = from && chunk * 8 < columns;
    cp_async_16(to + tile_place<ROWS>(row, chunk), inside ? from + chunk * 8 : anything, inside ? 16 : 0);
  }
}

// An accumulator of N columns as the A operands of the next product.
template <class T, int N>
FP_DEVICE void pack_operand(uint32_t (&a)[N / 16][4], const float (&x)[N / 2]) {
  FP_UNROLL
  for (int step = 0; step < N / 16; step++)
    FP_UNROLL for (int i = 0; i < 4; i++) a[step][i] = pack<T>(x[8 * step + 2 * i], x[8 * step + 2 * i + 1]);
}

}  // namespace fastprefix
