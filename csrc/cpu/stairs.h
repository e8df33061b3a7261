// The products of a tile on the diagonal, where a row sees the first keys only: what nobody sees is not computed.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

constexpr int STEP = 16;  // keys that are cut off together
constexpr int STEPS = KEYS / STEP;

// The keys of a tile in steps. Rows of a block stand in the order of their positions, so that those which see a key are
// the last ones: of step u, those from row first[u] on, which is a multiple of L.
struct Stairs {
  int64_t first[STEPS] = {};
  int64_t half = KEYS;  // keys of the tile that the first half of the rows sees
};

static Stairs stairs(const RowBlock& rows, const Bounds& bounds, int64_t t, int64_t count, int64_t N) {
  Stairs x;
  if (t + count - 1 <= bounds.high) return x;
  for (int u = 1; u < STEPS; u++) {
    int64_t row = x.first[u - 1];
    while (row < rows.n && rows.high[row] < t + u * STEP) row++;
    x.first[u] = row < rows.n ? row / L * L : N;
  }
  // A product of half the width is a little slower for each key: it pays where enough keys are left out.
  if (N == ROWS) {
    const int64_t seen = rows.high[ROWS / 2 - 1] - t + 1;
    if (3 * seen < 2 * count) x.half = seen > 0 ? seen : 0;
  }
  return x;
}

// The most terms of a product of two rows that are added one after the other. An error of a score is a relative error of
// its weight, and the rounding of one chain of 128 terms would outweigh all other errors of o and of the gradients.
constexpr int64_t CHAIN = 48;

// scores[key][row] = sum over d of keys[key][d] * transposed[d][row], in chains of equal length that are added up.
static void product_in_chains(int64_t count, int64_t N, int64_t width, const float* keys, int64_t key_row,
                              const float* transposed, float* scores) {
  const int64_t chains = (width + CHAIN - 1) / CHAIN, length = (width + chains - 1) / chains;
  gemm<Start::ZERO>(count, N, length, keys, key_row, 1, transposed, ROWS, scores, ROWS);
  for (int64_t d = length; d < width; d += length)
    gemm<Start::ADD>(count, N, width - d < length ? width - d : length, keys + d, key_row, 1, transposed + d * ROWS, ROWS,
                     scores, ROWS);
}

// The same, but 0 where a step is cut off.
static void product_of_keys(const Stairs& x, int64_t count, int64_t N, int64_t width, const float* keys, int64_t key_row,
                            const float* transposed, float* scores) {
  if (x.first[STEPS - 1] == 0) return product_in_chains(count, N, width, keys, key_row, transposed, scores);
  for (int u = 0; u * STEP < count; u++) {
    const int64_t own = count - u * STEP < STEP ? count - u * STEP : STEP, first = x.first[u];
    float* to = scores + u * STEP * ROWS;
    for (int64_t i = 0; i < own; i++)
      for (int64_t j = 0; j < first; j += L) store(to + i * ROWS + j, vf{});
    product_in_chains(own, N - first, width, keys + u * STEP * key_row, key_row, transposed + first, to + first);
  }
}

// found[d][row] (+)= sum over keys of values[key][d] * weights[key][row].
template <Start START>
static void product_of_weights(const Stairs& x, int64_t count, int64_t N, int64_t width, const float* values,
                               int64_t value_row, const float* weights, float* found, const float* factor) {
  if (x.half >= count) return gemm<START>(width, N, count, values, 1, value_row, weights, ROWS, found, ROWS, factor);
  constexpr int HALF = ROWS / 2;
  gemm<START>(width, HALF, x.half, values, 1, value_row, weights, ROWS, found, ROWS, factor);
  gemm<START>(width, HALF, count, values, 1, value_row, weights + HALF, ROWS, found + HALF, ROWS,
              START == Start::SCALE ? factor + HALF : nullptr);
}

// to[key][...] (+)= sum over rows of scores[key][row] * rows[row][...].
template <Start START>
static void product_of_rows(const Stairs& x, int64_t count, int64_t N, int64_t width, const float* scores,
                            const float* rows, int64_t row, float* to, int64_t to_row) {
  if (x.first[STEPS - 1] == 0) return gemm<START>(count, width, N, scores, ROWS, 1, rows, row, to, to_row);
  for (int u = 0; u * STEP < count; u++) {
    const int64_t own = count - u * STEP < STEP ? count - u * STEP : STEP, first = x.first[u];
    gemm<START>(own, width, N - first, scores + u * STEP * ROWS + first, ROWS, 1, rows + first * row, row,
                to + u * STEP * to_row, to_row);
  }
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
