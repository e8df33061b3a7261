// How a forward is cut into tasks. The cuts follow from the call alone, so that its bits do not depend on the threads.
#include <vector>

#include "prefix_rows.h"
#include "rows.h"

namespace fastprefix {
namespace {

constexpr int64_t TASKS = 32;       // so many keep the threads of a common processor busy
constexpr int64_t FEWEST_KEYS = 256;  // of a task: the keys are not cut finer
constexpr int64_t MOST_CHUNKS = 64;
// Below so many multiplications a second thread costs more than it brings.
constexpr int64_t SERIAL = 200'000;
// Rows of a sample from which its own prefix pass is as fast as one with other samples' rows, and prefix tokens up to
// which it is anyway.
constexpr int64_t MANY_ROWS = 24, SHORT_PREFIX = 48;
// Bytes of keys and values that stay in a core's cache while several blocks of rows meet them.
constexpr int64_t CACHED = 1 << 19;

int64_t chunks_for(int64_t keys, int64_t units) {
  const int64_t wanted = ceil_div(TASKS, std::max<int64_t>(units, 1));
  return std::clamp<int64_t>(std::min(wanted, ceil_div(keys, FEWEST_KEYS)), 1, MOST_CHUNKS);
}

struct Forward {
  const Call& c;
  Shape shape;
  const Kernels& run;
  int64_t R, longest_prefix = 0, most_keys = 0;
  Blocks blocks;
  std::vector<Extent> extents;  // by sample, with a padding mask only

  explicit Forward(const Call& call)
      : c(call), shape(shape_of(call)), run(kernels()), R(rows_of(call)), blocks(R) {
    for (int64_t n = 0; n < c.prefix.number; n++) longest_prefix = std::max(longest_prefix, c.prefix.length[n]);
    if (c.padding)
      for (int64_t b = 0; b < c.B; b++) extents.push_back(unpadded(c, b));
    for (int64_t b = 0; b < c.B; b++) {
      const Extent own = extent(b);
      const int64_t high = c.causal ? std::min(start_of(c, b) + c.S, own.last) : own.last;
      const int64_t low = c.window ? std::max(start_of(c, b) - c.window + 1, own.first) : own.first;
      most_keys = std::max(most_keys, high - low);
    }
  }

  Extent extent(int64_t b) const { return extents.empty() ? Extent{0, c.T} : extents[b]; }
  float* memory() const { return scratch(scratch_size(c.D, c.E)); }
  bool is_little(int64_t keys) const { return c.B * c.H * c.S * keys * (c.D + c.E) < SERIAL; }

  bool one_prefix_a_block() const {
    if (!c.prefix.ids || c.prefix.ids_row == 0) return true;
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t s = 1; s < c.S; s++)
        if (prefix_of(c, b, s) != prefix_of(c, b, 0)) return false;
    return true;
  }

  // Rows of one sample and head: prefix, content, and the result.
  void whole(int64_t index) const {
    const int64_t block = index % blocks.number, b = index / blocks.number % c.B, h = index / blocks.number / c.B;
    RowBlock rows;
    add_rows(c, b, h, block * blocks.rows, std::min(R, (block + 1) * blocks.rows), nullptr, rows);
    if (!rows.n) return;
    const KeyRange ranges[] = {prefix_range(c, prefix_of(c, b, 0), h), content_range(c, b, h, visible(extent(b), rows))};
    run.attend(shape, rows, ranges, 2, nullptr, memory());
  }

  void in_wholes() const {
    const auto task = [](const void* x, int64_t i) { static_cast<const Forward*>(x)->whole(i); };
    run_tasks(c.K * c.B * blocks.number, is_little(longest_prefix + most_keys), task, this);
  }
};

// The softmax in parts: a prefix's chunks of keys meet the rows of all its samples, each sample's chunks of content its
// own rows, and the parts of a row are combined at last.
struct Parts : Forward {
  PrefixRows prefixes;
  int64_t prefix_chunks = 0, content_chunks, all_rows;
  std::vector<PrefixTask> tasks;
  std::vector<int64_t> chunks_of;  // by prefix
  float* parts;

  explicit Parts(const Forward& forward) : Forward(forward), prefixes(c), all_rows(c.B * R), chunks_of(c.prefix.number, 0) {
    cut_prefixes();
    content_chunks = c.T ? chunks_for(most_keys, c.K * c.B * blocks.number) : 0;
    parts = workspace((prefix_chunks + content_chunks) * c.K * all_rows * (c.E + 2));
  }

  void cut_prefixes() {
    for (const PrefixGroup& group : prefixes.groups) {
      const int64_t keys = c.prefix.length[group.id];
      if (!keys) continue;
      const Blocks cut(group.count * c.groups());
      int64_t chunks = chunks_for(keys, c.K * prefixes.groups.size());
      if (cut.number > 1) chunks = std::clamp(ceil_div(keys * (c.D + c.E) * 4, CACHED), chunks, MOST_CHUNKS);
      const int64_t size = ceil_div(ceil_div(keys, chunks), 16) * 16;
      chunks = ceil_div(keys, size);
      prefix_chunks = std::max(prefix_chunks, chunks);
      chunks_of[group.id] = chunks;
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        tasks.push_back({&group, chunk, chunk * size, std::min(keys, (chunk + 1) * size)});
    }
  }

  // Of a row, by its place among the prefix's rows or, for content, among all.
  Partial part(int64_t number, int64_t h, int64_t row) const {
    const int64_t slots = (prefix_chunks + content_chunks) * c.K * all_rows;
    const int64_t slot = (number * c.K + h) * all_rows + row;
    return {parts + slot * c.E, parts + slots * c.E + slot, parts + slots * (c.E + 1) + slot};
  }

  // All rows of a prefix, block by block, while the chunk of keys is in the core's cache.
  void prefix(int64_t index) const {
    const PrefixTask& task = tasks[index / c.K];
    const int64_t h = index % c.K, all = task.group->count * c.groups();
    const Blocks cut(all);
    KeyRange range = prefix_range(c, task.group->id, h);
    range.first = task.first_key;
    range.last = task.last_key;
    for (int64_t first = 0; first < all; first += cut.rows) {
      RowBlock rows;
      prefixes.add_rows(c, *task.group, h, first, std::min(all, first + cut.rows), nullptr, rows);
      const Partial partial = part(task.chunk, h, task.group->first * c.groups() + first);
      run.attend(shape, rows, &range, 1, &partial, memory());
    }
  }

  void content(int64_t index) const {
    const int64_t chunk = index % content_chunks, block = index / content_chunks % blocks.number;
    const int64_t b = index / content_chunks / blocks.number % c.B, h = index / content_chunks / blocks.number / c.B;
    RowBlock rows;
    add_rows(c, b, h, block * blocks.rows, std::min(R, (block + 1) * blocks.rows), nullptr, rows);
    if (!rows.n) return;
    const Extent keys = visible(extent(b), rows);
    const int64_t size = ceil_div(ceil_div(keys.last - keys.first, content_chunks), 16) * 16;
    const Extent own{std::min(keys.last, keys.first + chunk * size), std::min(keys.last, keys.first + (chunk + 1) * size)};
    const KeyRange range = content_range(c, b, h, own);
    const Partial partial = part(prefix_chunks + chunk, h, b * R + block * blocks.rows);
    run.attend(shape, rows, &range, 1, &partial, memory());
  }

  void combine(int64_t index) const {
    const int64_t b = index % c.B, h = index / c.B;
    // Rows of one prefix lie side by side among the parts.
    const int64_t step = prefixes.by_token ? c.groups() : R;
    Partial found[2 * MOST_CHUNKS];
    for (int64_t first = 0; first < R; first += step)
      for (int64_t row = first; row < std::min(R, first + step); row += ROWS) {
        RowBlock rows;
        add_rows(c, b, h, row, std::min({R, first + step, row + ROWS}), nullptr, rows);
        const int64_t unit = b * c.S + row / c.groups(), id = prefix_of(c, b, row / c.groups());
        int64_t count = 0;
        const int64_t chunks = id < 0 ? 0 : chunks_of[id];
        for (int64_t p = 0; p < chunks; p++)
          found[count++] = part(p, h, prefixes.place(unit) * c.groups() + row % c.groups());
        for (int64_t p = 0; p < content_chunks; p++) found[count++] = part(prefix_chunks + p, h, b * R + row);
        run.combine(shape, rows, found, count, memory());
      }
  }

  void compute() const {
    const bool little = is_little(longest_prefix + most_keys);
    const int64_t own = content_chunks * c.K * c.B * blocks.number;
    const auto task = [](const void* x, int64_t i) {
      const Parts& parts = *static_cast<const Parts*>(x);
      const int64_t prefix_tasks = parts.tasks.size() * parts.c.K;
      i < prefix_tasks ? parts.prefix(i) : parts.content(i - prefix_tasks);
    };
    run_tasks(tasks.size() * c.K + own, little, task, this);
    const auto last = [](const void* x, int64_t i) { static_cast<const Parts*>(x)->combine(i); };
    run_tasks(c.K * c.B, (prefix_chunks + content_chunks) * c.K * all_rows * c.E < SERIAL, last, this);
  }
};

}  // namespace

void forward(const Call& call) {
  const Forward plan(call);
  const bool shared = call.B > 1 && plan.R < MANY_ROWS && plan.longest_prefix > SHORT_PREFIX;
  const int64_t units = call.K * call.B * plan.blocks.number;
  if (!shared && plan.one_prefix_a_block() && chunks_for(plan.longest_prefix + plan.most_keys, units) == 1)
    plan.in_wholes();
  else
    Parts(plan).compute();
  release_workspace();
}

}  // namespace fastprefix
