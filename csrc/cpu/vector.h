// The vector operations that the kernels use, for the instruction set that FASTPREFIX_ISA names.
//
// Included by kernels_*.cpp below a `#pragma GCC target`, never elsewhere. All that stands here and in the other headers
// of the kernels has internal linkage and calls nothing of the standard library: an inline function with external
// linkage that was compiled for AVX-512 could be the one that the linker keeps for everybody.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

// Floats in a vector: 16 with AVX-512, 8 with AVX2, 4 otherwise. It tells the instruction sets apart, as GCC before 13 does
// not define the macros of a `#pragma GCC target` in C++.
constexpr int L = FASTPREFIX_LANES;

typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint16_t vh __attribute__((vector_size(L * 2)));
// The same in memory, at any address.
typedef float vf_memory __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef int32_t vi_memory __attribute__((vector_size(L * 4), aligned(4), may_alias));
typedef uint16_t vh_memory __attribute__((vector_size(L * 2), aligned(2), may_alias));

#define FASTPREFIX_INLINE static inline __attribute__((always_inline))

FASTPREFIX_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_memory*>(p); }
FASTPREFIX_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_memory*>(p) = x; }
FASTPREFIX_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_memory*>(p); }
FASTPREFIX_INLINE vf splat(float x) { return x - vf{}; }
FASTPREFIX_INLINE vi splat(int32_t x) { return x - vi{}; }

// The larger of two; x where one of them is not a number.
FASTPREFIX_INLINE vf maximum(vf x, vf y) {
#if FASTPREFIX_LANES == 16
  return (vf)_mm512_max_ps((__m512)y, (__m512)x);
#elif FASTPREFIX_LANES == 8
  return (vf)_mm256_max_ps((__m256)y, (__m256)x);
#else
  return y > x ? y : x;
#endif
}

FASTPREFIX_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted: see setup.py's -ffp-contract

#if defined(__clang__)
#define FASTPREFIX_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FASTPREFIX_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, vi{__VA_ARGS__})
#endif
#if FASTPREFIX_LANES == 16
#define FASTPREFIX_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FASTPREFIX_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define FASTPREFIX_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FASTPREFIX_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif FASTPREFIX_LANES == 8
#define FASTPREFIX_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FASTPREFIX_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define FASTPREFIX_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FASTPREFIX_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FASTPREFIX_EVEN 0, 2, 4, 6
#define FASTPREFIX_ODD 1, 3, 5, 7
#define FASTPREFIX_LOW 0, 4, 1, 5
#define FASTPREFIX_HIGH 2, 6, 3, 7
#endif

// Sums of pairs of neighbouring lanes: first x's, then y's.
FASTPREFIX_INLINE vf add_pairs(vf x, vf y) {
  return FASTPREFIX_SHUFFLE(x, y, FASTPREFIX_EVEN) + FASTPREFIX_SHUFFLE(x, y, FASTPREFIX_ODD);
}

// The first halves of x and y, and the second ones, lane by lane in turn.
FASTPREFIX_INLINE vf interleave_low(vf x, vf y) { return FASTPREFIX_SHUFFLE(x, y, FASTPREFIX_LOW); }
FASTPREFIX_INLINE vf interleave_high(vf x, vf y) { return FASTPREFIX_SHUFFLE(x, y, FASTPREFIX_HIGH); }

FASTPREFIX_INLINE float sum(vf x) {
  float lanes[L], total = 0.f;
  store(lanes, x);
  for (int width = L / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  total = lanes[0];
  return total;
}

FASTPREFIX_INLINE float largest(vf x) {
  float lanes[L];
  store(lanes, x);
  float found = lanes[0];
  for (int i = 1; i < L; i++) found = lanes[i] > found ? lanes[i] : found;
  return found;
}

// 2 to the power of x, to 2e-9 of a polynomial and a rounding; 0 for -inf and what is below 2^-126, nan for nan. A number
// smaller than that would cost a processor hundreds of cycles, and there are many where a mask hides keys.
FASTPREFIX_INLINE vf exp2(vf x) {
  const float c1 = 0.6931471824645996f, c2 = 0.24022647738456726f, c3 = 0.055503323674201965f,
              c4 = 0.00961843691766262f, c5 = 0.0013398875016719103f, c6 = 0.00015353360504377633f;
#if FASTPREFIX_LANES == 16
  const vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf given = x;
  x = given < -126.f ? splat(-126.f) : given;
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const vf whole = (x + magic) - magic;
#endif
  const vf part = x - whole;
  vf p = splat(c6);
  p = fma(p, part, splat(c5));
  p = fma(p, part, splat(c4));
  p = fma(p, part, splat(c3));
  p = fma(p, part, splat(c2));
  p = fma(p, part, splat(c1));
  p = fma(p, part, splat(1.f));
#if FASTPREFIX_LANES == 16
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)whole);
#else
  const vi exponent = (__builtin_convertvector(whole, vi) + 127) << 23;
  return given < -126.f ? vf{} : p * (vf)exponent;
#endif
}

// e to the power of x, for differences of scores, whose logarithms stay in base e: in base 2 the largest would overflow.
FASTPREFIX_INLINE vf exp(vf x) { return exp2(x * 1.4426950408889634f); }
FASTPREFIX_INLINE float exp(float x) { return exp(splat(x))[0]; }

// tanh to a few ulp: a polynomial near 0 (Cephes' tanhf), where the other form cancels.
FASTPREFIX_INLINE vf tanh(vf x) {
  vf square = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  vf near = fma(p * square, x, x);
  vf size = x < 0.f ? -x : x;
  vf far = 1.f - 2.f / (exp2((size > 15.f ? splat(15.f) : size) * 2.885390081777927f) + 1.f);
  far = x < 0.f ? -far : far;
  return size < 0.625f ? near : far;
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
