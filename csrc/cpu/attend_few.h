// Attention of one to eight rows: the head dim lies in the vector lanes, and every key and value is read once.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

constexpr int FEW = 8;

// Keys, and vectors of values, that are computed together: what the registers hold.
template <int R>
constexpr int TOGETHER = L == 16 ? (R <= 4 ? 4 : 2) : (R <= 3 ? 4 : R <= 6 ? 2 : 1);

// Keys or values of a tile, which are read where they are.
struct Rows {
  const char* at;
  int64_t row;   // bytes from one to the next
  int64_t more;  // how many there are from here on, those of further tiles included
};

// Ask for bytes first..first + bytes - 1 of the row a tile behind row i, while row i is computed with: a processor has
// few requests of memory under way at once, so that it would wait if a whole tile were asked for.
FASTPREFIX_INLINE void ask_for_next(const Rows& x, int64_t i, int64_t first, int64_t bytes) {
  if (i + KEYS >= x.more) return;
  const char* next = x.at + (i + KEYS) * x.row + first;
  for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(next + c, 0, 2);
}

// Products of all rows with keys first..first + 3 of a tile, of which the last is `last`; each row's four products lie
// in one vector, each in L / 4 lanes whose sum it is.
template <int R, Type T>
FASTPREFIX_INLINE void four_keys(int64_t D, const float* q, const Rows& k, int64_t first, int64_t last, vf* found) {
  constexpr int A = TOGETHER<R>;
  vf products[4][R];
#pragma GCC unroll 4
  for (int half = 0; half < 4; half += A) {
    const char* row[A];
#pragma GCC unroll 4
    for (int a = 0; a < A; a++) {
      const int64_t key = first + half + a < last ? first + half + a : last;
      row[a] = k.at + key * k.row;
      ask_for_next(k, key, 0, D * size_of(T));
    }
    vf sums[A][R];
#pragma GCC unroll 4
    for (int a = 0; a < A; a++)
#pragma GCC unroll 8
      for (int h = 0; h < R; h++) sums[a][h] = vf{};
    for (int64_t d = 0; d < D; d += L) {
      vf y[A];
#pragma GCC unroll 4
      for (int a = 0; a < A; a++) y[a] = read_vector<T>(row[a], d);
#pragma GCC unroll 8
      for (int h = 0; h < R; h++) {
        const vf x = load(q + h * D + d);
#pragma GCC unroll 4
        for (int a = 0; a < A; a++) sums[a][h] = fma(x, y[a], sums[a][h]);
      }
    }
#pragma GCC unroll 4
    for (int a = 0; a < A; a++)
#pragma GCC unroll 8
      for (int h = 0; h < R; h++) products[half + a][h] = sums[a][h];
  }
#pragma GCC unroll 8
  for (int h = 0; h < R; h++)
    found[h] = add_pairs(add_pairs(products[0][h], products[1][h]), add_pairs(products[2][h], products[3][h]));
}

template <int R, Type T>
static void few_scores(int64_t D, const float* q, const Rows& k, int64_t count, float* scores) {
  for (int64_t c = 0; c < count; c += L) {
    vf parts[L / 4][R];
#pragma GCC unroll 4
    for (int u = 0; u < L / 4; u++) four_keys<R, T>(D, q, k, c + 4 * u, count - 1, parts[u]);
#pragma GCC unroll 8
    for (int h = 0; h < R; h++) {
      vf found = parts[0][h];
      if constexpr (L == 8) found = add_pairs(parts[0][h], parts[1][h]);
      if constexpr (L == 16)
        found = add_pairs(add_pairs(parts[0][h], parts[1][h]), add_pairs(parts[2 % (L / 4)][h], parts[3 % (L / 4)][h]));
      store(scores + h * KEYS + c, found);
    }
  }
}

// o[h][e...] += sum over keys of weights[h][key] * v[key][e...], for W vectors of values.
template <int R, int W, Type T>
FASTPREFIX_INLINE void few_values_block(int64_t E, int64_t e, const float* weights, const Rows& v, int64_t count,
                                        float* o) {
  vf sums[R][W];
#pragma GCC unroll 8
  for (int h = 0; h < R; h++)
#pragma GCC unroll 4
    for (int j = 0; j < W; j++) sums[h][j] = load(o + h * E + e + j * L);
  for (int64_t i = 0; i < count; i++) {
    vf y[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; j++) y[j] = read_vector<T>(v.at + i * v.row, e + j * L);
    ask_for_next(v, i, e * size_of(T), W * L * size_of(T));
#pragma GCC unroll 8
    for (int h = 0; h < R; h++) {
      const vf x = splat(weights[h * KEYS + i]);
#pragma GCC unroll 4
      for (int j = 0; j < W; j++) sums[h][j] = fma(x, y[j], sums[h][j]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < R; h++)
#pragma GCC unroll 4
    for (int j = 0; j < W; j++) store(o + h * E + e + j * L, sums[h][j]);
}

template <int R, Type T>
static void few_values(int64_t E, const float* weights, const Rows& v, int64_t count, float* o) {
  constexpr int W = TOGETHER<R>;
  int64_t e = 0;
  for (; e + W * L <= E; e += W * L) few_values_block<R, W, T>(E, e, weights, v, count, o);
  for (; e < E; e += L) few_values_block<R, 1, T>(E, e, weights, v, count, o);
}

// The running softmax of few rows.
struct FewState {
  float *q, *o, *scores, *copy;  // [R, D], [R, E], [R, KEYS], a tile
  float m[FEW], l[FEW];
};

template <int R, Type T>
static void few_tile(const Shape& shape, const RowBlock& rows, const KeyRange& range, const Bounds& bounds, int64_t t,
                     int64_t count, const Rows& k, const Rows& v, FewState& state) {
  float* scores = state.scores;
  few_scores<R, T>(shape.D, state.q, k, count, scores);
  if (shape.softcap > 0.f) cap_scores(shape.softcap, scores, R, KEYS, (count + L - 1) / L * L, nullptr);
  hide<1, KEYS>(shape, rows, range, bounds, t, count, scores);
  const int64_t padded = (count + L - 1) / L * L;
  for (int h = 0; h < R; h++) {
    float* p = scores + h * KEYS;
    for (int64_t i = count; i < padded; i++) p[i] = HIDDEN;
    vf top = splat(state.m[h]);
    for (int64_t i = 0; i < padded; i += L) top = maximum(top, load(p + i));
    const float m = largest(top), base = m == HIDDEN ? 0.f : m;
    vf total = vf{};
    for (int64_t i = 0; i < padded; i += L) {
      const vf weights = exp(load(p + i) - base);
      store(p + i, weights);
      total += weights;
    }
    if (m != state.m[h]) {
      const float alpha = exp(state.m[h] - base);
      state.l[h] *= alpha;
      for (int64_t e = 0; e < shape.E; e += L) store(state.o + h * shape.E + e, load(state.o + h * shape.E + e) * alpha);
      state.m[h] = m;
    }
    state.l[h] += sum(total);
  }
  few_values<R, T>(shape.E, scores, v, count, state.o);
}

template <int R, Type T>
static void few_keys(const Shape& shape, const RowBlock& rows, const KeyRange& range, FewState& state) {
  const Bounds bounds = common_bounds(rows);
  for (int64_t t = range.first; t < range.last; t += KEYS) {
    const int64_t count = range.last - t < KEYS ? range.last - t : KEYS;
    if (range.type == shape.type && !has_padding(shape, range, t, count)) {
      const int64_t k_row = range.k_row * size_of(T), v_row = range.v_row * size_of(T), more = range.last - t;
      const Rows k{static_cast<const char*>(range.k) + t * k_row, k_row, more};
      const Rows v{static_cast<const char*>(range.v) + t * v_row, v_row, more};
      few_tile<R, T>(shape, rows, range, bounds, t, count, k, v, state);
    } else {
      prefetch_tile(shape, range, t + KEYS);
      const Tile y = tile(shape, range, t, count, state.copy);
      const Rows k{reinterpret_cast<const char*>(y.k), y.k_row * size_of(Type::F32), count};
      const Rows v{reinterpret_cast<const char*>(y.v), y.v_row * size_of(Type::F32), count};
      few_tile<R, Type::F32>(shape, rows, range, bounds, t, count, k, v, state);
    }
  }
}

template <int R>
static void few_keys(const Shape& shape, const RowBlock& rows, const KeyRange& range, FewState& state) {
  switch (shape.type) {
    case Type::BF16: return few_keys<R, Type::BF16>(shape, rows, range, state);
    case Type::F16: return few_keys<R, Type::F16>(shape, rows, range, state);
    default: return few_keys<R, Type::F32>(shape, rows, range, state);
  }
}

static void few_keys(const Shape& shape, const RowBlock& rows, const KeyRange& range, FewState& state) {
  switch (rows.n) {
    case 1: return few_keys<1>(shape, rows, range, state);
    case 2: return few_keys<2>(shape, rows, range, state);
    case 3: return few_keys<3>(shape, rows, range, state);
    case 4: return few_keys<4>(shape, rows, range, state);
    case 5: return few_keys<5>(shape, rows, range, state);
    case 6: return few_keys<6>(shape, rows, range, state);
    case 7: return few_keys<7>(shape, rows, range, state);
    default: return few_keys<8>(shape, rows, range, state);
  }
}

static void attend_few(const Shape& shape, const RowBlock& rows, const KeyRange* ranges, int count,
                       const Partial* partial, float* scratch) {
  FewState state;
  state.q = scratch;
  state.o = state.q + FEW * shape.D;
  state.scores = state.o + FEW * shape.E;
  state.copy = state.scores + FEW * KEYS;
  for (int64_t i = 0; i < rows.n; i++) {
    read_row(shape.type, state.q + i * shape.D, rows.q[i], shape.D, shape.D, shape.scale);
    state.m[i] = HIDDEN;
    state.l[i] = 0.f;
  }
  for (int64_t i = 0; i < rows.n * shape.E; i += L) store(state.o + i, vf{});
  for (int r = 0; r < count; r++) few_keys(shape, rows, ranges[r], state);
  for (int64_t i = 0; i < rows.n; i++) {
    float* o = state.o + i * shape.E;
    if (partial) {
      write_row(Type::F32, partial->o + i * shape.E, o, shape.E);
      partial->m[i] = state.m[i];
      partial->l[i] = state.l[i];
      continue;
    }
    const Finished finished = finish_row(state.m[i], state.l[i], rows.sink[i]);
    for (int64_t e = 0; e < shape.E; e += L) store(o + e, load(o + e) * finished.factor);
    write_row(shape.type, rows.o[i], o, shape.E);
    *rows.lse[i] = finished.lse;
  }
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
