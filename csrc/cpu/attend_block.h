// Attention of up to 64 rows: the rows lie in the vector lanes, so that a softmax needs no sum across lanes.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

struct BlockState {
  int64_t N, d, e;  // rows, D and E, each rounded up to whole vectors
  float *rows;      // [N, max(d, e)]
  float *qt, *ot;   // [d, ROWS] and [e, ROWS]: transposed
  float *scores;    // [KEYS, ROWS]
  float *m, *l, *alpha;  // [ROWS]
  float *copy;      // a tile
  bool fresh = true;  // ot holds nothing yet
};

FASTPREFIX_INLINE int64_t whole_vectors(int64_t n) { return (n + L - 1) / L * L; }

static BlockState block_state(const Shape& shape, int64_t rows, float* scratch) {
  BlockState x;
  x.N = whole_vectors(rows);
  x.d = whole_vectors(shape.D);
  x.e = whole_vectors(shape.E);
  x.rows = scratch;
  x.qt = x.rows + ROWS * (x.d > x.e ? x.d : x.e);
  x.ot = x.qt + ROWS * x.d;
  x.scores = x.ot + ROWS * x.e;
  x.m = x.scores + KEYS * ROWS;
  x.l = x.m + ROWS;
  x.alpha = x.l + ROWS;
  x.copy = x.alpha + ROWS;
  return x;
}

static void online_softmax(BlockState& x, int64_t count) {
  for (int64_t j = 0; j < x.N; j += L) {
    float* s = x.scores + j;
    const vf before = load(x.m + j);
    vf top = before, other = before;
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      top = maximum(top, load(s + i * ROWS));
      other = maximum(other, load(s + (i + 1) * ROWS));
    }
    for (; i < count; i++) top = maximum(top, load(s + i * ROWS));
    top = maximum(top, other);
    const vf base = top == HIDDEN ? vf{} : top;
    vf even = vf{}, odd = vf{};
    for (i = 0; i + 2 <= count; i += 2) {
      const vf a = exp(load(s + i * ROWS) - base), b = exp(load(s + (i + 1) * ROWS) - base);
      store(s + i * ROWS, a);
      store(s + (i + 1) * ROWS, b);
      even += a;
      odd += b;
    }
    for (; i < count; i++) {
      const vf a = exp(load(s + i * ROWS) - base);
      store(s + i * ROWS, a);
      even += a;
    }
    const vf alpha = exp(before - base);
    store(x.m + j, top);
    store(x.l + j, load(x.l + j) * alpha + even + odd);
    store(x.alpha + j, alpha);
  }
}

static void block_keys(const Shape& shape, const RowBlock& rows, const KeyRange& range, BlockState& x) {
  const Bounds bounds = common_bounds(rows);
  for (int64_t t = range.first; t < range.last; t += KEYS) {
    const int64_t count = range.last - t < KEYS ? range.last - t : KEYS;
    const Tile y = tile(shape, range, t, count, x.copy);
    if (x.N <= 32) prefetch_tile(shape, range, t + KEYS);  // memory is the limit of few rows
    const Stairs steps = range.content ? stairs(rows, bounds, t, count, x.N) : Stairs{};
    product_of_keys(steps, count, x.N, shape.D, y.k, y.k_row, x.qt, x.scores);
    if (shape.softcap > 0.f) cap_scores(shape.softcap, x.scores, count, ROWS, x.N, nullptr);
    hide<ROWS, 1>(shape, rows, range, bounds, t, count, x.scores);
    online_softmax(x, count);
    if (x.fresh)
      product_of_weights<Start::ZERO>(steps, count, x.N, shape.E, y.v, y.v_row, x.scores, x.ot, nullptr);
    else
      product_of_weights<Start::SCALE>(steps, count, x.N, shape.E, y.v, y.v_row, x.scores, x.ot, x.alpha);
    x.fresh = false;
  }
}

static void attend_block(const Shape& shape, const RowBlock& rows, const KeyRange* ranges, int count,
                         const Partial* partial, float* scratch) {
  BlockState x = block_state(shape, rows.n, scratch);
  for (int64_t i = 0; i < rows.n; i++) {
    if (i + AHEAD < rows.n) prefetch_row(rows.q[i + AHEAD], shape.D * size_of(shape.type));
    read_row(shape.type, x.rows + i * x.d, rows.q[i], shape.D, x.d, shape.scale);
  }
  for (int64_t i = rows.n * x.d; i < x.N * x.d; i += L) store(x.rows + i, vf{});
  transpose(x.N, x.d, x.rows, x.d, x.qt, ROWS);
  for (int64_t j = 0; j < x.N; j += L) {
    store(x.m + j, splat(HIDDEN));
    store(x.l + j, vf{});
  }
  for (int r = 0; r < count; r++)
    if (ranges[r].first < ranges[r].last) block_keys(shape, rows, ranges[r], x);
  if (x.fresh)
    for (int64_t e = 0; e < x.e; e++)
      for (int64_t j = 0; j < x.N; j += L) store(x.ot + e * ROWS + j, vf{});
  if (!partial) {
    for (int64_t i = 0; i < x.N; i++) {
      const Finished finished = finish_row(x.m[i], x.l[i], i < rows.n ? rows.sink[i] : HIDDEN);
      x.alpha[i] = finished.factor;
      if (i < rows.n) *rows.lse[i] = finished.lse;
    }
    for (int64_t e = 0; e < shape.E; e++)
      for (int64_t j = 0; j < x.N; j += L) store(x.ot + e * ROWS + j, load(x.ot + e * ROWS + j) * load(x.alpha + j));
  }
  transpose(x.e, x.N, x.ot, ROWS, x.rows, x.e);
  for (int64_t i = 0; i < rows.n; i++) {
    if (!partial) {
      write_row(shape.type, rows.o[i], x.rows + i * x.e, shape.E);
      continue;
    }
    write_row(Type::F32, partial->o + i * shape.E, x.rows + i * x.e, shape.E);
    partial->m[i] = x.m[i];
    partial->l[i] = x.l[i];
  }
}

static void attend(const Shape& shape, const RowBlock& rows, const KeyRange* ranges, int count, const Partial* partial,
                   float* scratch) {
  if (rows.n <= FEW && shape.D % L == 0 && shape.E % L == 0)
    attend_few(shape, rows, ranges, count, partial, scratch);
  else
    attend_block(shape, rows, ranges, count, partial, scratch);
}

static void combine(const Shape& shape, const RowBlock& rows, const Partial* parts, int64_t count, float* scratch) {
  for (int64_t i = 0; i < rows.n; i++) {
    float m = HIDDEN, l = 0.f;
    for (int64_t p = 0; p < count; p++) m = parts[p].m[i] > m ? parts[p].m[i] : m;
    const float base = m == HIDDEN ? 0.f : m;
    const int64_t padded = whole_vectors(shape.E);
    for (int64_t e = 0; e < padded; e += L) store(scratch + e, vf{});
    for (int64_t p = 0; p < count; p++) {
      // A part without a key for the row has written nothing that could be read.
      if (parts[p].l[i] == 0.f) continue;
      const float weight = exp(parts[p].m[i] - base);
      const float* o = parts[p].o + i * shape.E;
      l += parts[p].l[i] * weight;
      int64_t e = 0;
      for (; e + L <= shape.E; e += L) store(scratch + e, fma(splat(weight), load(o + e), load(scratch + e)));
      for (; e < shape.E; e++) scratch[e] += weight * o[e];
    }
    const Finished finished = finish_row(m, l, rows.sink[i]);
    for (int64_t e = 0; e < padded; e += L) store(scratch + e, load(scratch + e) * finished.factor);
    write_row(shape.type, rows.o[i], scratch, shape.E);
    *rows.lse[i] = finished.lse;
  }
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
