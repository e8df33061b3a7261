// From products of q and k to scores: softcap, bias and everything that hides a key.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

constexpr float HIDDEN = -__builtin_huge_valf();
constexpr float MASKED_BIAS = -1e37f;  // a bias at or below it means "not visible"; as in types.py

// Cap `count` lines of `width` scores; the derivative of the cap goes to `slopes` if wanted.
static void cap_scores(float cap, float* scores, int64_t count, int64_t line, int64_t width, float* slopes) {
  const float inverse = 1.f / cap;
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < width; j += L) {
      float* p = scores + i * line + j;
      const vf capped = tanh(load(p) * inverse);
      store(p, capped * cap);
      if (slopes) store(slopes + i * line + j, 1.f - capped * capped);
    }
}

FASTPREFIX_INLINE float bias_at(const Shape& shape, const char* row, int64_t key) {
  const int64_t i = key * shape.bias_key;
  float x;
  switch (shape.bias_type) {
    case Type::BOOL: return row[i] ? 0.f : HIDDEN;
    case Type::BF16: x = read<Type::BF16>(row, i); break;
    case Type::F16: x = read<Type::F16>(row, i); break;
    default: x = read<Type::F32>(row, i);
  }
  return x > MASKED_BIAS ? x : HIDDEN;  // a nan hides, too, as in masks.py
}

// What is the same for all tiles of a run of content keys.
struct Bounds {
  int64_t low, high;  // keys low..high are within the bounds of every row
};

static Bounds common_bounds(const RowBlock& rows) {
  Bounds found{rows.low[0], rows.high[0]};
  for (int64_t i = 1; i < rows.n; i++) {
    if (rows.low[i] > found.low) found.low = rows.low[i];
    if (rows.high[i] < found.high) found.high = rows.high[i];
  }
  return found;
}

FASTPREFIX_INLINE int32_t relative(int64_t position, int64_t first) {
  const int64_t x = position - first;
  return (int32_t)(x < -1 ? -1 : x > KEYS ? KEYS : x);
}

// Add one number for each key, `bias`, to the scores of all rows.
template <int KEY, int ROW>
static void add_key_bias(int64_t n, const float* bias, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; i++) {
    const float x = bias[i] > MASKED_BIAS ? bias[i] : HIDDEN;
    for (int64_t j = 0; j < n; j++) scores[i * KEY + j * ROW] += x;
  }
}

// Add the bias to the scores of keys t..t + count - 1 and set hidden ones to -inf. The score of key i and row j is at
// i * KEY + j * ROW: in blocks rows lie side by side, for few rows keys do.
template <int KEY, int ROW>
static void hide(const Shape& shape, const RowBlock& rows, const KeyRange& range, const Bounds& bounds, int64_t t,
                 int64_t count, float* scores) {
  if (!range.content) {
    if (range.bias) add_key_bias<KEY, ROW>(rows.n, range.bias + t, count, scores);
    return;
  }
  if (shape.has_bias)
    for (int64_t j = 0; j < rows.n; j++)
      for (int64_t i = 0; i < count; i++) scores[i * KEY + j * ROW] += bias_at(shape, rows.bias[j], t + i);
  if (t < bounds.low || t + count - 1 > bounds.high) {
    if constexpr (ROW == 1) {
      int32_t low[ROWS], high[ROWS];
      const int64_t padded = (rows.n + L - 1) / L * L;
      for (int64_t j = 0; j < padded; j++) {
        low[j] = j < rows.n ? relative(rows.low[j], t) : -1;
        high[j] = j < rows.n ? relative(rows.high[j], t) : KEYS;
      }
      for (int64_t j = 0; j < padded; j += L) {
        const vi first = load(low + j), last = load(high + j);
        for (int64_t i = 0; i < count; i++) {
          float* p = scores + i * KEY + j;
          const vi key = splat((int32_t)i);
          store(p, key < first ? splat(HIDDEN) : key > last ? splat(HIDDEN) : load(p));
        }
      }
    } else {
      for (int64_t j = 0; j < rows.n; j++)
        for (int64_t i = 0; i < count; i++)
          if (t + i < rows.low[j] || t + i > rows.high[j]) scores[i * KEY + j * ROW] = HIDDEN;
    }
  }
  if (range.padding)
    for (int64_t i = 0; i < count; i++)
      if (!range.padding[(t + i) * shape.padding_key])
        for (int64_t j = 0; j < rows.n; j++) scores[i * KEY + j * ROW] = HIDDEN;
  if (range.segments)
    for (int64_t i = 0; i < count; i++) {
      const int64_t segment = range.segments[(t + i) * shape.segments_key];
      for (int64_t j = 0; j < rows.n; j++)
        if (rows.segment[j] != segment) scores[i * KEY + j * ROW] = HIDDEN;
    }
}

// A tile of keys and values as the kernels read it.
struct Tile {
  const float *k, *v;
  int64_t k_row, v_row;
};

// Whether a padding mask hides one of keys t..t + count - 1.
static bool has_padding(const Shape& shape, const KeyRange& range, int64_t t, int64_t count) {
  if (!range.padding) return false;
  for (int64_t i = 0; i < count; i++)
    if (!range.padding[(t + i) * shape.padding_key]) return true;
  return false;
}

// Whether rows so far apart crowd in few sets of a first-level cache, which has 64 sets of lines of 64 bytes. Several heads
// side by side make strides of 4096 bytes and the like.
FASTPREFIX_INLINE bool crowds(int64_t row, int64_t width) {
  const int64_t lines = row * 4 / 64;
  return row > width && row % 16 == 0 && lines % 16 == 0;
}

// Keys t..t + count - 1 where they lie; or, in another type, too far apart, or with padding among them, which counts as
// zeros whatever it holds, copied to `copy`, which holds KEYS rows of both.
static Tile tile(const Shape& shape, const KeyRange& range, int64_t t, int64_t count, float* copy) {
  const int64_t bytes = size_of(range.type);
  const char* k = static_cast<const char*>(range.k) + t * range.k_row * bytes;
  const char* v = static_cast<const char*>(range.v) + t * range.v_row * bytes;
  const bool padded = has_padding(shape, range, t, count);
  const bool far = crowds(range.k_row, shape.D) || crowds(range.v_row, shape.E);
  if (range.type == Type::F32 && shape.type == Type::F32 && !padded && !far)
    return {reinterpret_cast<const float*>(k), reinterpret_cast<const float*>(v), range.k_row, range.v_row};
  const int64_t d = (shape.D + L - 1) / L * L, e = (shape.E + L - 1) / L * L;
  float* copy_v = copy + KEYS * d;
  for (int64_t i = 0; i < count; i++) {
    const bool seen = !padded || range.padding[(t + i) * shape.padding_key];
    if (i + AHEAD < count) {
      prefetch_row(k + (i + AHEAD) * range.k_row * bytes, shape.D * bytes);
      prefetch_row(v + (i + AHEAD) * range.v_row * bytes, shape.E * bytes);
    }
    read_rounded(range.type, shape.type, copy + i * d, k + i * range.k_row * bytes, seen ? shape.D : 0, d);
    read_rounded(range.type, shape.type, copy_v + i * e, v + i * range.v_row * bytes, seen ? shape.E : 0, e);
  }
  return {copy, copy_v, d, e};
}

// Ask for keys t..t + KEYS - 1 and their values, which are needed next: where rows are few, memory is the limit.
static void prefetch_tile(const Shape& shape, const KeyRange& range, int64_t t) {
  const int64_t bytes = size_of(range.type), last = t + KEYS < range.last ? t + KEYS : range.last;
  for (int64_t i = t; i < last; i++) {
    const char* k = static_cast<const char*>(range.k) + i * range.k_row * bytes;
    const char* v = static_cast<const char*>(range.v) + i * range.v_row * bytes;
    for (int64_t c = 0; c < shape.D * bytes; c += 64) __builtin_prefetch(k + c, 0, 2);
    for (int64_t c = 0; c < shape.E * bytes; c += 64) __builtin_prefetch(v + c, 0, 2);
  }
}

// What remains to be done with a row's sums: divide, and say what they were. `factor` is for o.
struct Finished {
  float factor, lse;
};

FASTPREFIX_INLINE Finished finish_row(float m, float l, float sink) {
  if (m == HIDDEN && l == 0.f) return {0.f, sink};  // l is a nan where a score was one
  if (sink > m) {
    const float own = exp(m - sink);
    l = l * own + 1.f;
    return {own / l, sink + __builtin_logf(l)};
  }
  l += exp(sink - m);
  return {1.f / l, m + __builtin_logf(l)};
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
