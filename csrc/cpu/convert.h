// Rows of fp32, bf16 and fp16 numbers in memory, and fp32 vectors.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

FASTPREFIX_INLINE float from_half(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, size = x & 0x7fffu;
  uint32_t bits = size << 13;
  float found = 0.f;
  if (size >= 0x7c00u) {
    bits |= 0x7f800000u;
    __builtin_memcpy(&found, &bits, 4);
  } else {
    __builtin_memcpy(&found, &bits, 4);
    found *= 0x1p112f;  // the exponent's bias; right for subnormal numbers as well
  }
  __builtin_memcpy(&bits, &found, 4);
  bits |= sign;
  __builtin_memcpy(&found, &bits, 4);
  return found;
}

FASTPREFIX_INLINE uint16_t to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {  // subnormal: let an addition round
    float size;
    __builtin_memcpy(&size, &bits, 4);
    size += 0.5f;
    __builtin_memcpy(&bits, &size, 4);
    return sign | (uint16_t)(bits - 0x3f000000u);
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);  // another bias, and half of the last place that is kept
  return sign | (uint16_t)(bits >> 13);
}

FASTPREFIX_INLINE uint16_t to_bfloat(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Element i of a row.
template <Type T>
FASTPREFIX_INLINE float read(const void* row, int64_t i) {
  if constexpr (T == Type::F32) return static_cast<const float*>(row)[i];
  const uint16_t bits = static_cast<const uint16_t*>(row)[i];
  if constexpr (T == Type::F16) return from_half(bits);
  const uint32_t wide = (uint32_t)bits << 16;
  float found;
  __builtin_memcpy(&found, &wide, 4);
  return found;
}

// Elements i to i + L - 1 of a row.
template <Type T>
FASTPREFIX_INLINE vf read_vector(const void* row, int64_t i) {
  if constexpr (T == Type::F32) {
    return load(static_cast<const float*>(row) + i);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(row) + i;
    if constexpr (T == Type::BF16) {
      return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_memory*>(p), vi) << 16);
    } else {
#if FASTPREFIX_LANES == 16
      return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FASTPREFIX_LANES == 8
      return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
      vf found;
      for (int j = 0; j < L; j++) found[j] = from_half(p[j]);
      return found;
#endif
    }
  }
}

// Numbers to the nearest of 16 bits, those halfway to the even one.
template <Type T>
FASTPREFIX_INLINE void write_vector(uint16_t* to, vf x) {
  if constexpr (T == Type::BF16) {
    vi bits = (vi)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vi is_nan = x != x;
    bits = (bits & ~is_nan) | (is_nan & 0x7fc0);
    *reinterpret_cast<vh_memory*>(to) = __builtin_convertvector(bits, vh);
  } else {
#if FASTPREFIX_LANES == 16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif FASTPREFIX_LANES == 8
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < L; i++) to[i] = to_half(x[i]);
#endif
  }
}

// Rows lie far apart: ask for those that are read next.
constexpr int64_t AHEAD = 8;

FASTPREFIX_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(static_cast<const char*>(row) + c);
}

// A row of n numbers as fp32, times a factor; zeros up to `padded`.
template <Type T>
FASTPREFIX_INLINE void read_row(float* to, const void* from, int64_t n, int64_t padded, float factor) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, read_vector<T>(from, i) * factor);
  for (; i < n; i++) to[i] = read<T>(from, i) * factor;
  for (; i < padded; i++) to[i] = 0.f;
}

static void read_row(Type type, float* to, const void* from, int64_t n, int64_t padded, float factor = 1.f) {
  switch (type) {
    case Type::BF16: return read_row<Type::BF16>(to, from, n, padded, factor);
    case Type::F16: return read_row<Type::F16>(to, from, n, padded, factor);
    default: return read_row<Type::F32>(to, from, n, padded, factor);
  }
}

template <Type T>
FASTPREFIX_INLINE void write_half_row(uint16_t* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) write_vector<T>(to + i, load(from + i));
  for (; i < n; i++) to[i] = T == Type::BF16 ? to_bfloat(from[i]) : to_half(from[i]);
}

static void write_row(Type type, void* to, const float* from, int64_t n) {
  uint16_t* half = static_cast<uint16_t*>(to);
  if (type == Type::BF16) return write_half_row<Type::BF16>(half, from, n);
  if (type == Type::F16) return write_half_row<Type::F16>(half, from, n);
  float* p = static_cast<float*>(to);
  int64_t i = 0;
  for (; i + L <= n; i += L) store(p + i, load(from + i));
  for (; i < n; i++) p[i] = from[i];
}

// A row of numbers of one type as if it had been stored in another.
static void read_rounded(Type type, Type rounded, float* to, const void* from, int64_t n, int64_t padded) {
  read_row(type, to, from, n, padded);
  if (rounded == Type::F32 || rounded == type) return;
  uint16_t half[WIDEST];
  write_row(rounded, half, to, n);
  read_row(rounded, to, half, n, padded);
}

// [rows, columns] to [columns, rows]; both are multiples of L.
static void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < columns; c += L) {
      vf x[L], y[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) x[i] = load(from + (r + i) * from_row + c);
      // Each step interleaves rows that lie half the block apart; after log2(L) steps rows are columns.
#pragma GCC unroll 4
      for (int step = 1; step < L; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; i++) {
          y[2 * i] = interleave_low(x[i], x[i + L / 2]);
          y[2 * i + 1] = interleave_high(x[i], x[i + L / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) x[i] = y[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store(to + (c + i) * to_row + r, x[i]);
    }
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
