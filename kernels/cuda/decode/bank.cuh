// Which rows read which prefix of a bank: units in the order of their prefixes, and the tiles of rows that this makes. The
// host cannot know, and asks nobody: it launches as many tiles as there can be at most.
//
// One block; each thread counts and then lists the units of one prefix, in their own order, so that the same ids always
// give the same sums. The ids are read by all threads at once, from the first-level cache.
#pragma once

#include "decode/params.cuh"

namespace fastprefix {

struct ListBankTiles {
  using Params = DecodeParams;
  static constexpr int THREADS = 256, WARPS = THREADS / 32, BLOCKS_PER_SM = 1;
  static constexpr uint32_t SHARED_BYTES = 2 * WARPS * sizeof(int);

  FP_DEVICE int id_at(const AttentionCall& c, const Divisor& by_S, int unit) {
    if (!c.ids_by_row) return prefix_of_id(c, integer_at(c.prefix_ids, unit * c.prefix_ids.batch));
    const int b = quotient(unit, by_S), s = remainder(unit, b, by_S);
    return prefix_of_id(c, integer_at(c.prefix_ids, b * c.prefix_ids.batch + s * c.prefix_ids.row));
  }

  // The sum of x over this thread and those before it.
  FP_DEVICE int scan(int x, uint32_t totals) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    FP_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = shfl_up(x, delta);
      if (lane >= delta) x += other;
    }
    if (lane == 31) st_shared(totals + warp * 4, x);
    sync_block();
    for (int before = 0; before < warp; before++) x += ld_shared_int(totals + before * 4);
    return x;
  }
  FP_DEVICE int total(uint32_t totals) {
    int sum = 0;
    FP_UNROLL for (int warp = 0; warp < WARPS; warp++) sum += ld_shared_int(totals + warp * 4);
    return sum;
  }

  FP_DEVICE void run(const DecodeParams& p) {
    const AttentionCall& c = p.call;
    const int rows_of_unit = static_cast<int>(p.by_G.divisor) * (c.ids_by_row ? 1 : c.S), block_m = 16 * p.plan.prefix_warps;
    const uint32_t unit_totals = shared_base(), tile_totals = unit_totals + WARPS * 4;
    int units_before = 0, tiles_before = 0;
    for (int base = 0; base < c.N; base += THREADS) {
      const int n = base + thread_index();
      int units = 0;
      if (n < c.N)
        for (int unit = 0; unit < p.plan.units; unit++) units += id_at(c, p.by_S, unit) == n;
      // A prefix without tokens needs no tiles, but its rows' states are read: they get some that have seen nothing.
      const int rows = units * rows_of_unit, tiles = p.bank_first ? 0 : cdiv(rows, block_m);
      const int first_unit = units_before + scan(units, unit_totals) - units;
      const int first_tile = tiles_before + scan(tiles, tile_totals) - tiles;
      if (p.bank_first && n < c.N) st_global(p.bank_first + n, first_unit);
      for (int i = 0; i < tiles; i++) st_global(p.tiles + first_tile + i, BankTile{n, i * block_m, rows, first_unit});
      if (units) {
        int place = first_unit;
        for (int unit = 0; unit < p.plan.units; unit++)
          if (id_at(c, p.by_S, unit) == n) st_global(p.bank_units + place++, unit);
      }
      units_before += total(unit_totals);
      tiles_before += total(tile_totals);
      sync_block();   // before the next prefixes' totals overwrite these
    }
    if (p.bank_first && thread_index() == 0) st_global(p.bank_first + c.N, units_before);
    for (int tile = tiles_before + thread_index(); tile < p.plan.prefix_tiles; tile += THREADS)
      st_global(p.tiles + tile, BankTile{-1, 0, 0, 0});
  }
};

}  // namespace fastprefix
