// Index arithmetic that kernels, launch code and tests share: tiles in shared memory, fragments of tensor cores, shares of
// keys. Nothing here touches memory.
#pragma once

#include <cmath>

#include "wrappers.cuh"

namespace fastprefix {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float NEGATIVE_INFINITY = -__builtin_huge_valf();
// A bias at or below this hides a key: masks are written as -inf and as the least finite number.
constexpr float MASKED_BIAS = -1e37f;

FP_CONSTEXPR int smaller(int a, int b) { return a < b ? a : b; }
FP_CONSTEXPR int larger(int a, int b) { return a > b ? a : b; }
FP_HOST_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
template <class A, class B>
FP_CONSTEXPR auto cdiv(A a, B b) { return (a + b - 1) / b; }

// Division by a number that only the host knows, without the twenty instructions of a division: quotients of
// 0 <= n < 2^31 by the method of Granlund and Montgomery (1994).
struct Divisor {
  uint32_t divisor, multiplier, shift;
};
inline Divisor divisor_of(int32_t d) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < static_cast<uint64_t>(d)) shift++;
  const uint64_t multiplier = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1;
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(multiplier), shift};
}
FP_HOST_DEVICE int quotient(int n, const Divisor& d) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.multiplier >> 32);
  return static_cast<int>((high + static_cast<uint32_t>(n)) >> d.shift);
}
FP_HOST_DEVICE int remainder(int n, int quotient, const Divisor& d) { return n - quotient * static_cast<int>(d.divisor); }

// A tile of rows of WIDTH 16-bit elements, in chunks of 16 bytes whose places are permuted by the row: the eight rows that
// a ldmatrix reads at once lie in different banks.
template <int WIDTH>
FP_CONSTEXPR uint32_t tile_offset(int row, int chunk) {
  static_assert(WIDTH % 64 == 0, "the permutation is of eight chunks");
  return static_cast<uint32_t>(row * WIDTH * 2 + ((chunk ^ (row & 7)) << 4));
}

// What a lane names in a ldmatrix.x4, as row and chunk relative to a 16x16 block. ROWS: the four matrices are the A operand
// of an mma, or, transposed, the B operand of two whose columns are the block's columns. COLUMNS: the B operand of two
// whose columns are the block's rows.
FP_CONSTEXPR int lane_row_by_rows(int lane) { return lane % 16; }
FP_CONSTEXPR int lane_chunk_by_rows(int lane) { return lane / 16; }
FP_CONSTEXPR int lane_row_by_columns(int lane) { return lane % 8 + lane / 16 * 8; }
FP_CONSTEXPR int lane_chunk_by_columns(int lane) { return lane / 8 % 2; }

// Rows (one of two, 8 apart) and columns (two adjacent ones) of an mma's accumulator that a lane holds.
FP_CONSTEXPR int accumulator_row(int lane, int half) { return lane / 4 + half * 8; }
FP_CONSTEXPR int accumulator_column(int lane) { return lane % 4 * 2; }

// The part of `count` tiles that falls to one of several splits: even shares, the last ones maybe empty.
struct Share {
  int first, end;
};
FP_HOST_DEVICE Share share_of(int count, int split, int splits) {
  const int each = cdiv(count, splits), first = smaller(count, split * each);
  return {first, smaller(count, first + each)};
}

}  // namespace fastprefix
