// Gradients of up to 64 rows, as FlashAttention-2's backward (Dao 2023) of each run of keys with the merged o and lse.
#pragma once

namespace fastprefix::FASTPREFIX_ISA {
namespace {

struct BackState {
  int64_t N, d, e;
  float *q, *dout;          // [N, d] and [N, e]
  float *qt, *dot, *dqt;    // [d, ROWS], [e, ROWS], [d, ROWS]: transposed, q times the scale
  float *weights, *ds, *slopes;  // [KEYS, ROWS]
  float *lse, *delta;       // [ROWS]
  float* unscaled;          // [ROWS]: delta without the scale
  float *copy;              // a tile
  bool fresh = true;        // dqt holds nothing yet
};

static BackState back_state(const Shape& shape, int64_t rows, float* scratch) {
  BackState x;
  x.N = whole_vectors(rows);
  x.d = whole_vectors(shape.D);
  x.e = whole_vectors(shape.E);
  x.q = scratch;
  x.dout = x.q + ROWS * x.d;
  x.qt = x.dout + ROWS * x.e;
  x.dot = x.qt + ROWS * x.d;
  x.dqt = x.dot + ROWS * x.e;
  x.weights = x.dqt + ROWS * x.d;
  x.ds = x.weights + KEYS * ROWS;
  x.slopes = x.ds + KEYS * ROWS;
  x.lse = x.slopes + KEYS * ROWS;
  x.delta = x.lse + ROWS;
  x.unscaled = x.delta + ROWS;
  x.copy = x.unscaled + ROWS;
  return x;
}

// weights = exp(scores - lse) and ds = weights * (scale * dp - scale * delta), in place of scores and dp. The gradient of
// the keys' bias, which comes after scale and cap, is added to `dbias` where that is not null.
static void weights_and_ds(BackState& x, float scale, int64_t count, bool need_ds, bool capped, float* dbias) {
  for (int64_t j = 0; j < x.N; j += L) {
    const vf lse = load(x.lse + j), delta = load(x.delta + j), factor = splat(scale);
    for (int64_t i = 0; i < count; i++) {
      float* p = x.weights + i * ROWS + j;
      // No weight is above 1, and so it stays where large scores are not recomputed to the last bit.
      const vf exponent = load(p) - lse;
      const vf weights = exp(exponent > 0.f ? vf{} : exponent);
      store(p, weights);
      if (!need_ds) continue;
      float* s = x.ds + i * ROWS + j;
      if (dbias) dbias[i] += sum(weights * (load(s) + load(x.unscaled + j)));
      vf ds = weights * fma(load(s), factor, delta);
      if (capped) ds *= load(x.slopes + i * ROWS + j);
      store(s, ds);
    }
  }
}

// grad[key][...] (+)= sum over rows of scores[key][row] * rows[row][...]. A width that is not whole vectors takes a
// detour by `spare` [KEYS, padded].
static void add_gradient(const Stairs& steps, int64_t count, int64_t N, int64_t width, int64_t padded, const float* scores, const float* rows,
                         float* grad, int64_t grad_row, bool add, float* spare) {
  if (width == padded) {
    if (add)
      product_of_rows<Start::ADD>(steps, count, N, width, scores, rows, padded, grad, grad_row);
    else
      product_of_rows<Start::ZERO>(steps, count, N, width, scores, rows, padded, grad, grad_row);
    return;
  }
  product_of_rows<Start::ZERO>(steps, count, N, padded, scores, rows, padded, spare, padded);
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < width; c++) {
      const float x = spare[i * padded + c];
      float* to = grad + i * grad_row + c;
      *to = add ? *to + x : x;
    }
}

static void backward_keys(const Shape& shape, const RowBlock& rows, const KeyRange& range, bool need_dq, BackState& x) {
  const Bounds bounds = common_bounds(rows);
  const bool need_ds = need_dq || range.dk || range.dbias, capped = shape.softcap > 0.f;
  for (int64_t t = range.first; t < range.last; t += KEYS) {
    const int64_t count = range.last - t < KEYS ? range.last - t : KEYS;
    const Tile y = tile(shape, range, t, count, x.copy);
    float* spare = x.copy + KEYS * (x.d + x.e);
    const Stairs steps = range.content ? stairs(rows, bounds, t, count, x.N) : Stairs{};
    product_of_keys(steps, count, x.N, shape.D, y.k, y.k_row, x.qt, x.weights);
    if (need_ds) product_of_keys(steps, count, x.N, shape.E, y.v, y.v_row, x.dot, x.ds);
    if (capped) cap_scores(shape.softcap, x.weights, count, ROWS, x.N, x.slopes);
    hide<ROWS, 1>(shape, rows, range, bounds, t, count, x.weights);
    float* dbias = range.dbias ? range.dbias + t : nullptr;
    if (dbias && !range.add)
      for (int64_t i = 0; i < count; i++) dbias[i] = 0.f;
    weights_and_ds(x, shape.scale, count, need_ds, capped, dbias);
    if (range.dv)
      add_gradient(steps, count, x.N, shape.E, x.e, x.weights, x.dout, range.dv + t * range.dv_row, range.dv_row, range.add, spare);
    if (range.dk)
      add_gradient(steps, count, x.N, shape.D, x.d, x.ds, x.q, range.dk + t * range.dk_row, range.dk_row, range.add, spare);
    if (need_dq) {
      if (x.fresh)
        product_of_weights<Start::ZERO>(steps, count, x.N, shape.D, y.k, y.k_row, x.ds, x.dqt, nullptr);
      else
        product_of_weights<Start::ADD>(steps, count, x.N, shape.D, y.k, y.k_row, x.ds, x.dqt, nullptr);
      x.fresh = false;
    }
  }
}

static void backward(const Shape& shape, const RowBlock& rows, const KeyRange* ranges, int count, bool add_dq,
                     float* scratch) {
  BackState x = back_state(shape, rows.n, scratch);
  float* o = x.dqt;  // not needed yet
  for (int64_t i = 0; i < rows.n; i++) {
    if (i + AHEAD < rows.n) {
      prefetch_row(rows.q[i + AHEAD], shape.D * size_of(shape.type));
      prefetch_row(rows.dout[i + AHEAD], shape.E * size_of(shape.type));
      prefetch_row(rows.o[i + AHEAD], shape.E * size_of(shape.type));
    }
    read_row(shape.type, x.q + i * x.d, rows.q[i], shape.D, x.d);
    read_row(shape.type, x.dout + i * x.e, rows.dout[i], shape.E, x.e);
    read_row(shape.type, o, rows.o[i], shape.E, x.e);
    vf delta = vf{};
    for (int64_t e = 0; e < x.e; e += L) delta = fma(load(o + e), load(x.dout + i * x.e + e), delta);
    x.unscaled[i] = -sum(delta);
    x.delta[i] = x.unscaled[i] * shape.scale;
    // A row that saw nothing has the weight 0 everywhere.
    const float lse = *rows.lse[i];
    x.lse[i] = lse == HIDDEN ? -HIDDEN : lse;
  }
  for (int64_t i = rows.n; i < x.N; i++) {
    x.delta[i] = x.unscaled[i] = 0.f;
    x.lse[i] = -HIDDEN;
  }
  for (int64_t i = rows.n * x.d; i < x.N * x.d; i += L) store(x.q + i, vf{});
  for (int64_t i = rows.n * x.e; i < x.N * x.e; i += L) store(x.dout + i, vf{});
  transpose(x.N, x.d, x.q, x.d, x.qt, ROWS);
  transpose(x.N, x.e, x.dout, x.e, x.dot, ROWS);
  for (int64_t d = 0; d < x.d; d++)
    for (int64_t j = 0; j < x.N; j += L) store(x.qt + d * ROWS + j, load(x.qt + d * ROWS + j) * shape.scale);
  const bool need_dq = rows.dq[0] != nullptr;
  for (int r = 0; r < count; r++) backward_keys(shape, rows, ranges[r], need_dq, x);
  if (!need_dq) return;
  if (x.fresh)
    for (int64_t d = 0; d < x.d; d++)
      for (int64_t j = 0; j < x.N; j += L) store(x.dqt + d * ROWS + j, vf{});
  transpose(x.d, x.N, x.dqt, ROWS, x.q, x.d);
  for (int64_t i = 0; i < rows.n; i++) {
    float *to = rows.dq[i], *from = x.q + i * x.d;
    int64_t d = 0;
    if (add_dq) {
      for (; d + L <= shape.D; d += L) store(to + d, load(to + d) + load(from + d));
      for (; d < shape.D; d++) to[d] += from[d];
    } else {
      write_row(Type::F32, to, from, shape.D);
    }
  }
}

}  // namespace
}  // namespace fastprefix::FASTPREFIX_ISA
