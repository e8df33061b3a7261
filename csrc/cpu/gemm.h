// c[m][n] (+)= sum over k of a(m, k) * b[k][n]: the one product of matrices, for tiles that lie in the caches.
//
// n lies in the vector lanes. The numbers of `a` are read one by one, at any two strides, so that keys and values are
// read as they lie in memory: every product of attention, forward and backward, has a form in which only rows of q and
// of the output's gradient, a block at a time, need to be transposed.
//
// The K terms of a product are added one after the other, from zero; what `c` held is added to their sum. So the terms of
// a tile are not rounded to the size to which the sum over all tiles has grown.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

enum class Start { ZERO, ADD, SCALE };  // c = ..., c += ..., c = c * factor[n] + ...

template <int M, int V, Start START>
FASTPREFIX_INLINE void gemm_block(int64_t K, const float* __restrict a, int64_t a_m, int64_t a_k, const float* __restrict b,
                                  int64_t b_k, float* __restrict c, int64_t c_m, const float* factor) {
  vf sums[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) sums[i][j] = vf{};
  for (int64_t k = 0; k < K; k++) {
    vf y[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) y[j] = load(b + k * b_k + j * L);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const vf x = splat(a[i * a_m + k * a_k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) sums[i][j] = fma(x, y[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) {
      float* to = c + i * c_m + j * L;
      if constexpr (START == Start::ADD) sums[i][j] += load(to);
      if constexpr (START == Start::SCALE) sums[i][j] = fma(load(to), load(factor + j * L), sums[i][j]);
      store(to, sums[i][j]);
    }
}

template <int M, int V, Start START>
static void gemm_strip(int64_t rows, int64_t K, const float* a, int64_t a_m, int64_t a_k, const float* b, int64_t b_k,
                       float* c, int64_t c_m, const float* factor) {
  int64_t m = 0;
  for (; m + M <= rows; m += M) gemm_block<M, V, START>(K, a + m * a_m, a_m, a_k, b, b_k, c + m * c_m, c_m, factor);
  if constexpr (M > 4)
    for (; m + 4 <= rows; m += 4) gemm_block<4, V, START>(K, a + m * a_m, a_m, a_k, b, b_k, c + m * c_m, c_m, factor);
  if constexpr (M > 2)
    for (; m + 2 <= rows; m += 2) gemm_block<2, V, START>(K, a + m * a_m, a_m, a_k, b, b_k, c + m * c_m, c_m, factor);
  for (; m < rows; m++) gemm_block<1, V, START>(K, a + m * a_m, a_m, a_k, b, b_k, c + m * c_m, c_m, factor);
}

// columns is a multiple of L.
template <Start START>
static void gemm(int64_t rows, int64_t columns, int64_t K, const float* a, int64_t a_m, int64_t a_k, const float* b,
                 int64_t b_k, float* c, int64_t c_m, const float* factor = nullptr) {
  for (int64_t n = 0; n < columns;) {
    const int64_t vectors = (columns - n) / L;
    const float* scaled = START == Start::SCALE ? factor + n : nullptr;
#define FASTPREFIX_STRIP(M, V)                                                    \
  gemm_strip<M, V, START>(rows, K, a, a_m, a_k, b + n, b_k, c + n, c_m, scaled); \
  n += V * L;
#if FASTPREFIX_LANES == 16  // 32 registers
    if (vectors >= 4) {
      FASTPREFIX_STRIP(6, 4)
    } else if (vectors == 3) {
      FASTPREFIX_STRIP(8, 3)
    } else if (vectors == 2) {
      FASTPREFIX_STRIP(12, 2)
    } else {
      FASTPREFIX_STRIP(14, 1)
    }
#else  // 16 registers
    if (vectors >= 2) {
      FASTPREFIX_STRIP(6, 2)
    } else {
      FASTPREFIX_STRIP(10, 1)
    }
#endif
#undef FASTPREFIX_STRIP
  }
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
