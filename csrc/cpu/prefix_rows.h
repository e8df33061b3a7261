// The query tokens of a call by the prefix that they see.
#pragma once

#include <vector>

#include "rows.h"

namespace fastprefix {

// Units first..first + count - 1 of PrefixRows::units; a unit is a query token with all its heads.
struct PrefixGroup {
  int64_t id, first, count;
};

struct PrefixTask {
  const PrefixGroup* group;
  int64_t chunk, first_key, last_key;
};

struct PrefixRows {
  std::vector<PrefixGroup> groups;
  bool by_token = false;

  explicit PrefixRows(const Call& c) {
    const int64_t all = c.B * c.S;
    if (!c.prefix.ids) {
      groups.push_back({0, 0, all});
      return;
    }
    by_token = c.prefix.ids_row != 0;
    // Stable: tokens of one prefix keep their order.
    std::vector<int64_t> count(c.prefix.number, 0);
    for (int64_t unit = 0; unit < all; unit++) {
      const int64_t id = prefix_of(c, unit / c.S, unit % c.S);
      if (id >= 0) count[id]++;
    }
    std::vector<int64_t> next(c.prefix.number, 0);
    int64_t first = 0;
    for (int64_t id = 0; id < c.prefix.number; id++) {
      next[id] = first;
      if (count[id]) groups.push_back({id, first, count[id]});
      first += count[id];
    }
    units.resize(first);
    places.assign(all, -1);
    for (int64_t unit = 0; unit < all; unit++) {
      const int64_t id = prefix_of(c, unit / c.S, unit % c.S);
      if (id < 0) continue;
      places[unit] = next[id]++;
      units[places[unit]] = unit;
    }
  }

  // Where unit b * S + s stands among the units of all prefixes.
  int64_t place(int64_t unit) const { return places.empty() ? unit : places[unit]; }

  // Rows first..last - 1 of a group, G to a unit, of one key/value head.
  void add_rows(const Call& c, const PrefixGroup& group, int64_t h, int64_t first, int64_t last,
                const Gradients* gradients, RowBlock& block) const {
    const int64_t G = c.groups();
    for (int64_t row = first; row < last; row++) {
      const int64_t place = group.first + row / G, unit = units.empty() ? place : units[place];
      add_row(c, unit / c.S, h, unit % c.S * G + row % G, gradients, block);
    }
  }

 private:
  std::vector<int64_t> units, places;
};

}  // namespace fastprefix
