// Which keys a block of the backward has, and which rows.
#pragma once

#include "backward/params.cuh"

namespace fastprefix {

// Keys of a block, and its packed rows: token r / G and head r % G of the group. Tokens are numbered through the batch,
// b * S + s, or, of a bank, through the units that read the prefix.
struct KeyTask {
  int b, h_kv, first_key, end_key;
  int first_row, end_row;
  int start;              // of the content: position of the sample's token 0
  int prefix, share;
  int keys;               // tokens that the prefix has: those from there to end_key get 0
  int first_unit;         // of a bank
  int64_t token;          // of the prefix's token 0 among those of all, as gradients lie
};

// A block's task may wait in shared memory, where 48 bytes are its, for whoever needs its registers.
FP_DEVICE void save_task(uint32_t to, const KeyTask& t) {
  const auto word = [](int64_t x) { return static_cast<uint32_t>(x); };
  st_shared(to, Bits4{{word(t.b), word(t.h_kv), word(t.first_key), word(t.end_key)}});
  st_shared(to + 16, Bits4{{word(t.first_row), word(t.end_row), word(t.start), word(t.prefix)}});
  st_shared(to + 32, Bits4{{word(t.share), word(t.keys), word(t.first_unit), word(t.token)}});
}
FP_DEVICE KeyTask saved_task(uint32_t from) {
  const Bits4 a = ld_shared_bits4(from), b = ld_shared_bits4(from + 16), c = ld_shared_bits4(from + 32);
  const auto number = [](uint32_t x) { return static_cast<int>(x); };
  KeyTask t{};
  t.b = number(a.x[0]);
  t.h_kv = number(a.x[1]);
  t.first_key = number(a.x[2]);
  t.end_key = number(a.x[3]);
  t.first_row = number(b.x[0]);
  t.end_row = number(b.x[1]);
  t.start = number(b.x[2]);
  t.prefix = number(b.x[3]);
  t.share = number(c.x[0]);
  t.keys = number(c.x[1]);
  t.first_unit = number(c.x[2]);
  t.token = number(c.x[3]);
  return t;
}

// Of a packed bank: which prefix has tile number `tile`, and which of its tiles that is. Behind the last prefix's tiles
// come those of tokens that no prefix has. By all lanes of a warp together.
template <int BLOCK_N>
FP_DEVICE void find_packed(const AttentionCall& c, int tile, KeyTask& t) {
  const int lane = thread_index() % 32;
  int tiles_before = 0, tokens_before = 0;
  for (int base = 0; base < c.N; base += 32) {
    const int keys = base + lane < c.N ? prefix_length(c, base + lane) : 0;
    int tiles = cdiv(keys, BLOCK_N), tokens = keys;
    FP_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
      const int more_tiles = shfl_up(tiles, delta), more_tokens = shfl_up(tokens, delta);
      if (lane >= delta) {
        tiles += more_tiles;
        tokens += more_tokens;
      }
    }
    int mine = tiles_before + tiles <= tile;   // how many prefixes lie before
    FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) mine += shfl_idx(mine, lane ^ mask);
    if (mine < 32) {
      t.prefix = base + mine;
      const int length = shfl_idx(keys, mine);
      t.keys = length;
      t.token = tokens_before + shfl_idx(tokens, mine) - length;
      // Lengths that the host could not see may be more than there are tokens.
      t.keys = static_cast<int>(smaller(t.keys, larger(0, c.P - static_cast<int>(t.token))));
      t.first_key = (tile - tiles_before - shfl_idx(tiles, mine) + cdiv(length, BLOCK_N)) * BLOCK_N;
      t.end_key = smaller(t.first_key + BLOCK_N, t.keys);
      return;
    }
    tiles_before += shfl_idx(tiles, 31);
    tokens_before += shfl_idx(tokens, 31);
  }
  t.prefix = -1;
  t.first_key = 0;
  t.token = tokens_before + int64_t{tile - tiles_before} * BLOCK_N;
  t.end_key = larger(0, smaller(BLOCK_N, static_cast<int>(c.P - t.token)));
}

}  // namespace fastprefix
