// The rows and keys of a call, as blocks and runs that the kernels take.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"

namespace fastprefix {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Shape shape_of(const Call& c) {
  return {c.D, c.E, c.q.type, c.scale, c.softcap, c.padding_key, c.segments_key, c.bias_key, c.bias != nullptr, c.bias_type};
}

// Number of query rows that share the keys of one sample and one key/value head.
inline int64_t rows_of(const Call& c) { return c.groups() * c.S; }

inline int64_t start_of(const Call& c, int64_t b) { return c.start ? c.start[b] : c.T - c.S; }

// -1: no prefix.
inline int64_t prefix_of(const Call& c, int64_t b, int64_t s) {
  return c.prefix.ids ? c.prefix.ids[b * c.prefix.ids_batch + s * c.prefix.ids_row] : 0;
}

// Add row `row` = s * G + g of sample b and key/value head h to a block.
inline void add_row(const Call& c, int64_t b, int64_t h, int64_t row, const Gradients* gradients, RowBlock& block) {
  const int64_t G = c.groups(), s = row / G, head = h * G + row % G, i = block.n++;
  block.q[i] = c.q.at(b, head, s);
  block.o[i] = c.o.at(b, head, s);
  block.lse[i] = c.lse + (b * c.H + head) * c.S + s;
  block.sink[i] = c.sinks ? c.sinks[head] : -std::numeric_limits<float>::infinity();
  const int64_t position = start_of(c, b) + s;
  block.high[i] = c.causal ? std::min(position, c.T - 1) : c.T - 1;
  block.low[i] = c.window ? std::max<int64_t>(position - c.window + 1, 0) : 0;
  block.segment[i] = 0;
  if (c.segments && c.T) {
    const int64_t own = std::clamp<int64_t>(position, 0, c.T - 1);
    block.segment[i] = c.segments[b * c.segments_batch + own * c.segments_key];
  }
  block.bias[i] = nullptr;
  if (c.bias)
    block.bias[i] = static_cast<const char*>(c.bias) +
                    (b * c.bias_batch + head * c.bias_head + s * c.bias_row) * size_of(c.bias_type);
  block.dq[i] = nullptr;
  if (gradients) {
    block.dout[i] = gradients->dout.at(b, head, s);
    if (gradients->q.data) block.dq[i] = reinterpret_cast<float*>(gradients->q.at(b, head, s));
  }
}

inline void add_rows(const Call& c, int64_t b, int64_t h, int64_t first, int64_t last, const Gradients* gradients,
                     RowBlock& block) {
  for (int64_t row = first; row < last; row++) add_row(c, b, h, row, gradients, block);
}

// How the rows of a sample are cut into blocks of equal size.
struct Blocks {
  int64_t number, rows;

  explicit Blocks(int64_t all) : number(ceil_div(all, ROWS)), rows(0) {
    if (number) rows = std::min<int64_t>(ceil_div(ceil_div(all, number), 16) * 16, ROWS);
  }
};

// Content keys of sample b that a padding mask shows lie within first..last - 1.
struct Extent {
  int64_t first, last;
};

inline Extent unpadded(const Call& c, int64_t b) {
  Extent found{0, c.T};
  if (!c.padding) return found;
  const uint8_t* mask = c.padding + b * c.padding_batch;
  while (found.first < found.last && !mask[found.first * c.padding_key]) found.first++;
  while (found.first < found.last && !mask[(found.last - 1) * c.padding_key]) found.last--;
  return found;
}

// The content keys that some row of a block can see.
inline Extent visible(const Extent& own, const RowBlock& block) {
  int64_t low = std::numeric_limits<int64_t>::max(), high = -1;
  for (int64_t i = 0; i < block.n; i++) {
    if (block.low[i] > block.high[i]) continue;
    low = std::min(low, block.low[i]);
    high = std::max(high, block.high[i]);
  }
  Extent found{std::max(own.first, low), std::min(own.last, high + 1)};
  if (found.first >= found.last) found = {0, 0};
  return found;
}

inline KeyRange content_range(const Call& c, int64_t b, int64_t h, const Extent& keys) {
  KeyRange x{};
  x.k = c.k.at(b, h, 0);
  x.v = c.v.at(b, h, 0);
  x.k_row = c.k.row;
  x.v_row = c.v.row;
  x.type = c.k.type;
  x.first = keys.first;
  x.last = keys.last;
  x.content = true;
  if (c.padding) x.padding = c.padding + b * c.padding_batch;
  if (c.segments) x.segments = c.segments + b * c.segments_batch;
  return x;
}

inline KeyRange prefix_range(const Call& c, int64_t id, int64_t h) {
  KeyRange x{};
  if (id < 0) return x;
  const int64_t first = c.prefix.first[id];
  x.k = c.prefix.k.at(id, h, first);
  x.v = c.prefix.v.at(id, h, first);
  x.k_row = c.prefix.k.row;
  x.v_row = c.prefix.v.row;
  x.type = c.prefix.k.type;
  x.last = c.prefix.length[id];
  if (c.prefix.bias) x.bias = c.prefix.bias + c.prefix.token(c.K, id, h);
  return x;
}

}  // namespace fastprefix
