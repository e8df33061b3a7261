// A tile of packed rows of one sample and key/value head, row r being token r / G and head r % G of the group.
#pragma once

#include "decode/params.cuh"

namespace fastprefix {

struct RowTile {
  int b, h_kv, first_row, rows, start;
  int low, high;                   // content keys that any of its rows may see
  int first_position, last_position;
  int least_segment, most_segment; // of its rows; 0 where there are none
};

// The segment of a content key, or of the query row at that position.
FP_DEVICE int64_t segment_at(const AttentionCall& c, int b, int position) {
  const int64_t place = larger(0, smaller(c.T - 1, position));
  return integer_at(c.segments, b * c.segments.batch + place * c.segments.row);
}
// The same in 32 bits, for bounds: ids that do not fit become the least or the largest number, which keeps their order.
FP_DEVICE int segment_in_bounds(int64_t id) {
  constexpr int64_t LARGEST = 0x7ffffffe;
  return static_cast<int>(id < -LARGEST ? -LARGEST : id > LARGEST ? LARGEST : id);
}

FP_DEVICE int first_position_of(const AttentionCall& c, int b) {
  return bounded(c.q_start.data ? integer_at(c.q_start, b * c.q_start.batch) : c.start);
}

// Which tile a block has. The longest of a causal head begin first, and the tiles of a head run side by side.
template <int BLOCK_M>
FP_DEVICE RowTile row_tile(const AttentionCall& c, const Divisor& by_G, int tiles) {
  const int tile = tiles - 1 - block_index() % tiles, head = block_index() / tiles;
  RowTile t{};
  t.b = head / c.H_kv;
  t.h_kv = head % c.H_kv;
  t.first_row = tile * BLOCK_M;
  t.rows = c.S * static_cast<int>(by_G.divisor);
  t.start = first_position_of(c, t.b);
  t.first_position = t.start + quotient(t.first_row, by_G);
  t.last_position = t.start + quotient(smaller(t.first_row + BLOCK_M, t.rows) - 1, by_G);
  t.low = c.window ? smaller(c.T, larger(0, t.first_position - c.window + 1)) : 0;
  t.high = larger(t.low, c.causal ? smaller(c.T, t.last_position + 1) : c.T);
  return t;
}

// A tile may wait in shared memory, where 48 bytes are its, for whoever needs its registers.
FP_DEVICE void save_tile(uint32_t to, const RowTile& t) {
  const auto word = [](int x) { return static_cast<uint32_t>(x); };
  st_shared(to, Bits4{{word(t.b), word(t.h_kv), word(t.first_row), word(t.rows)}});
  st_shared(to + 16, Bits4{{word(t.start), word(t.low), word(t.high), word(t.first_position)}});
  st_shared(to + 32, Bits4{{word(t.last_position), word(t.least_segment), word(t.most_segment), 0}});
}
FP_DEVICE RowTile saved_tile(uint32_t from) {
  const Bits4 a = ld_shared_bits4(from), b = ld_shared_bits4(from + 16), c = ld_shared_bits4(from + 32);
  const auto number = [](uint32_t x) { return static_cast<int>(x); };
  return {number(a.x[0]), number(a.x[1]), number(a.x[2]), number(a.x[3]), number(b.x[0]), number(b.x[1]),
          number(b.x[2]), number(b.x[3]), number(c.x[0]), number(c.x[1]), number(c.x[2])};
}

FP_DEVICE Place place_of(const Divisor& by_G, const RowTile& t, int row) {
  const int token = quotient(row, by_G);
  return {t.b, token, t.h_kv * static_cast<int>(by_G.divisor) + remainder(row, token, by_G)};
}

FP_DEVICE const uint16_t* element(const Rows& x, int64_t offset) { return static_cast<const uint16_t*>(x.data) + offset; }

}  // namespace fastprefix
