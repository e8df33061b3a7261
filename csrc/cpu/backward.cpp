// How a backward is cut into tasks. The cuts, and the order in which partial sums are added, follow from the call alone.
#include <cstring>
#include <vector>

#include "prefix_rows.h"
#include "rows.h"

namespace fastprefix {
namespace {

constexpr int64_t TASKS = 16;
constexpr int64_t MANY_ROWS = 48;  // of a sample, from which one pass over prefix and content beats two
constexpr int64_t SERIAL = 100'000;  // multiplications
// Bytes of partial sums of gradients. A longer prefix, or content, is cut less.
constexpr int64_t MOST_PARTIAL_BYTES = 1 << 26;

// to[i] += part[i]
void add_up(float* to, const float* part, int64_t size) {
  struct Sum {
    float* to;
    const float* part;
    int64_t size;
  } sum{to, part, size};
  constexpr int64_t STEP = 1 << 14;
  const auto task = [](const void* x, int64_t index) {
    const Sum& s = *static_cast<const Sum*>(x);
    for (int64_t i = index * STEP; i < std::min(s.size, (index + 1) * STEP); i++) s.to[i] += s.part[i];
  };
  run_tasks(ceil_div(size, STEP), size < SERIAL, task, &sum);
}

struct Backward {
  const Call& c;
  const Gradients& g;
  Shape shape;
  const Kernels& run;
  int64_t R, P, prefix_size;  // numbers in prefix_k, prefix_v and, where its gradient is needed, their bias, of one prefix
  Blocks blocks;
  bool need_prefix, need_content;

  Backward(const Call& call, const Gradients& gradients)
      : c(call), g(gradients), shape(shape_of(call)), run(kernels()), R(rows_of(call)), blocks(R) {
    P = c.prefix.ids ? 0 : c.prefix.length[0];
    prefix_size = c.K * P * (c.D + c.E + (g.prefix_bias ? 1 : 0));
    need_prefix = g.prefix_k || g.prefix_v || g.prefix_bias;
    need_content = g.q.data || g.k.data || g.v.data;
  }

  float* memory() const { return scratch(scratch_size(c.D, c.E)); }

  bool is_little() const {
    int64_t keys = c.T;
    for (int64_t n = 0; n < c.prefix.number; n++) keys = std::max(keys, c.T + c.prefix.length[n]);
    return c.B * c.H * c.S * keys * (c.D + c.E) < SERIAL;
  }

  // Gradients of a run of content keys, or of a prefix, at the addresses of its head.
  void content_gradients(KeyRange& range, int64_t b, int64_t h, float* k, float* v) const {
    range.dk_row = g.k.row;
    range.dv_row = g.v.row;
    if (g.k.data) range.dk = k + b * g.k.batch + h * g.k.head;
    if (g.v.data) range.dv = v + b * g.v.batch + h * g.v.head;
  }

  // Gradients of head h of the one prefix: at their place in the result or, in a part, one behind the other.
  void prefix_gradients(KeyRange& range, int64_t h, float* part) const {
    range.dk_row = c.D;
    range.dv_row = c.E;
    float* k = part ? part : g.prefix_k;
    float* v = part ? k + c.K * P * c.D : g.prefix_v;
    float* bias = part ? v + c.K * P * c.E : g.prefix_bias;
    if (g.prefix_k) range.dk = k + h * P * c.D;
    if (g.prefix_v) range.dv = v + h * P * c.E;
    if (g.prefix_bias) range.dbias = bias + h * P;
  }

  void add_prefix_parts(const float* parts, int64_t number) const {
    for (int64_t i = 0; i < number; i++, parts += prefix_size) {
      if (g.prefix_k) add_up(g.prefix_k, parts, c.K * P * c.D);
      if (g.prefix_v) add_up(g.prefix_v, parts + c.K * P * c.D, c.K * P * c.E);
      if (g.prefix_bias) add_up(g.prefix_bias, parts + c.K * P * (c.D + c.E), c.K * P);
    }
  }

  static void clear(float* rows, int64_t number, int64_t row, int64_t width) {
    for (int64_t i = 0; i < number; i++) std::memset(rows + i * row, 0, width * sizeof(float));
  }
};

// Each block of rows meets the prefix and then its content. A task has one head and some of the samples' blocks; each
// but the first leaves its sums of the prefix's gradients, and of those of a sample that it shares, to be added up.
struct OnePass : Backward {
  int64_t chunks, splits;  // of the samples, and of a sample's blocks
  float *prefix_parts = nullptr, *content_parts = nullptr;
  int64_t content_size = 0;

  OnePass(const Call& call, const Gradients& gradients) : Backward(call, gradients) {
    chunks = std::min(c.B, ceil_div(TASKS, c.K));
    splits = std::clamp<int64_t>(std::min(ceil_div(TASKS / 2, c.K * chunks), blocks.number / 2), 1, 8);
    const int64_t most = std::max<int64_t>(MOST_PARTIAL_BYTES / 4 / std::max<int64_t>(prefix_size, 1), 2);
    if (need_prefix) {
      chunks = std::min(chunks, most);
      splits = std::min(splits, std::max<int64_t>(most / chunks, 1));
    }
    content_size = (g.k.data ? c.B * c.T * c.K * c.D : 0) + (g.v.data ? c.B * c.T * c.K * c.E : 0);
    splits = std::clamp<int64_t>(MOST_PARTIAL_BYTES / 4 / std::max<int64_t>(content_size, 1) + 1, 1, splits);
    const int64_t prefix_number = need_prefix ? chunks * splits - 1 : 0;
    prefix_parts = workspace(prefix_number * prefix_size + (splits - 1) * content_size);
    content_parts = prefix_parts + prefix_number * prefix_size;
  }

  void task(int64_t index) const {
    const int64_t split = index % splits, chunk = index / splits % chunks, h = index / splits / chunks;
    const int64_t part = chunk * splits + split;
    KeyRange prefix = prefix_range(c, 0, h);
    if (need_prefix) prefix_gradients(prefix, h, part ? prefix_parts + (part - 1) * prefix_size : nullptr);
    for (int64_t b = c.B * chunk / chunks; b < c.B * (chunk + 1) / chunks; b++) samples(b, h, split, prefix);
  }

  void samples(int64_t b, int64_t h, int64_t split, KeyRange& prefix) const {
    float *k = reinterpret_cast<float*>(g.k.data), *v = reinterpret_cast<float*>(g.v.data);
    if (split) {
      k = content_parts + (split - 1) * content_size;
      v = k + (g.k.data ? c.B * c.T * c.K * c.D : 0);
    }
    KeyRange content = content_range(c, b, h, {0, c.T});
    content_gradients(content, b, h, k, v);
    const Extent own = unpadded(c, b);
    bool written = false;
    // The last block sees most keys: where it sees all, it writes what the others add to.
    for (int64_t block = blocks.number - 1; block >= 0; block--) {
      if (block % splits != split) continue;
      RowBlock rows;
      add_rows(c, b, h, block * blocks.rows, std::min(R, (block + 1) * blocks.rows), &g, rows);
      if (!rows.n) continue;
      const Extent keys = visible(own, rows);
      if (!written && (keys.first > 0 || keys.last < c.T)) clear_content(content);
      content.add = written || keys.first > 0 || keys.last < c.T;
      written = true;
      content.first = keys.first;
      content.last = keys.last;
      const KeyRange ranges[] = {content, prefix};
      run.backward(shape, rows, ranges, g.q.data || need_prefix ? 2 : 1, false, memory());
      prefix.add = true;
    }
    if (!written) clear_content(content);
  }

  void clear_content(const KeyRange& x) const {
    if (x.dk) clear(x.dk, c.T, x.dk_row, c.D);
    if (x.dv) clear(x.dv, c.T, x.dv_row, c.E);
  }

  void compute() const {
    const auto run_one = [](const void* x, int64_t i) { static_cast<const OnePass*>(x)->task(i); };
    run_tasks(c.K * chunks * splits, is_little(), run_one, this);
    if (need_prefix) add_prefix_parts(prefix_parts, chunks * splits - 1);
    if (splits > 1) {
      const int64_t size_k = g.k.data ? c.B * c.T * c.K * c.D : 0;
      if (size_k) add_content(reinterpret_cast<float*>(g.k.data), 0, size_k);
      if (g.v.data) add_content(reinterpret_cast<float*>(g.v.data), size_k, content_size - size_k);
    }
  }

  void add_content(float* to, int64_t offset, int64_t size) const {
    for (int64_t part = 0; part + 1 < splits; part++) add_up(to, content_parts + part * content_size + offset, size);
  }
};

// First the prefixes, whose blocks hold rows of several samples, then each sample's content. Both add to q's gradient.
struct TwoPasses : Backward {
  PrefixRows prefixes;
  int64_t row_chunks = 1, key_chunks = 1;  // of the one prefix
  float* parts = nullptr;

  TwoPasses(const Call& call, const Gradients& gradients) : Backward(call, gradients), prefixes(call) {
    if (c.prefix.ids || !P) return;
    // Without a gradient for q the tasks need not meet each other's rows: cut the keys, which leaves no partial sums.
    if (!g.q.data) key_chunks = std::clamp<int64_t>(ceil_div(TASKS, c.K), 1, ceil_div(P, KEYS));
    const int64_t number = Blocks(c.B * R).number;
    row_chunks = std::clamp<int64_t>(ceil_div(TASKS, c.K * key_chunks), 1, number);
    const int64_t most = std::max<int64_t>(MOST_PARTIAL_BYTES / 4 / std::max<int64_t>(prefix_size, 1), 2);
    if (need_prefix) row_chunks = std::min(row_chunks, most);
    if (need_prefix) parts = workspace((row_chunks - 1) * prefix_size);
  }

  // The one prefix: a head, some of the keys and some of the blocks of rows.
  void one(int64_t index) const {
    const int64_t keys = index % key_chunks, chunk = index / key_chunks % row_chunks, h = index / key_chunks / row_chunks;
    KeyRange range = prefix_range(c, 0, h);
    const int64_t size = ceil_div(ceil_div(P, key_chunks), KEYS) * KEYS;
    range.first = std::min(P, keys * size);
    range.last = std::min(P, (keys + 1) * size);
    if (range.first == range.last) return;
    if (need_prefix) prefix_gradients(range, h, chunk ? parts + (chunk - 1) * prefix_size : nullptr);
    const Blocks cut(c.B * R);
    meet(prefixes.groups[0], h, range, cut.rows * (cut.number * chunk / row_chunks),
         std::min(c.B * R, cut.rows * (cut.number * (chunk + 1) / row_chunks)), cut.rows);
  }

  void meet(const PrefixGroup& group, int64_t h, KeyRange range, int64_t first, int64_t last, int64_t step) const {
    for (int64_t row = first; row < last; row += step) {
      RowBlock rows;
      prefixes.add_rows(c, group, h, row, std::min(last, row + step), &g, rows);
      run.backward(shape, rows, &range, 1, true, memory());
      range.add = true;
    }
  }

  // A bank's prefix, whose gradients were cleared: a head and all its rows.
  void of_bank(int64_t index) const {
    const PrefixGroup& group = prefixes.groups[index / c.K];
    const int64_t h = index % c.K, rows = group.count * c.groups();
    KeyRange range = prefix_range(c, group.id, h);
    // The gradients are contiguous, whatever the bank's strides are.
    const int64_t row = c.prefix.token(c.K, group.id, h);
    range.dk = g.prefix_k ? g.prefix_k + row * c.D : nullptr;
    range.dv = g.prefix_v ? g.prefix_v + row * c.E : nullptr;
    range.dbias = g.prefix_bias ? g.prefix_bias + row : nullptr;
    range.dk_row = c.D;
    range.dv_row = c.E;
    meet(group, h, range, 0, rows, Blocks(rows).rows);
  }

  void content(int64_t index) const {
    const int64_t b = index % c.B, h = index / c.B;
    KeyRange range = content_range(c, b, h, {0, c.T});
    content_gradients(range, b, h, reinterpret_cast<float*>(g.k.data), reinterpret_cast<float*>(g.v.data));
    if (range.dk) clear(range.dk, c.T, range.dk_row, c.D);
    if (range.dv) clear(range.dv, c.T, range.dv_row, c.E);
    range.add = true;
    const Extent own = unpadded(c, b);
    for (int64_t block = 0; block < blocks.number; block++) {
      RowBlock rows;
      add_rows(c, b, h, block * blocks.rows, std::min(R, (block + 1) * blocks.rows), &g, rows);
      if (!rows.n) continue;
      const Extent keys = visible(own, rows);
      range.first = keys.first;
      range.last = keys.last;
      run.backward(shape, rows, &range, 1, true, memory());
    }
  }

  void compute() const {
    const bool little = is_little();
    if (g.q.data) std::memset(g.q.data, 0, c.B * c.S * c.H * c.D * sizeof(float));
    if (g.q.data || need_prefix) {
      if (c.prefix.ids) {
        const auto task = [](const void* x, int64_t i) { static_cast<const TwoPasses*>(x)->of_bank(i); };
        run_tasks(c.K * prefixes.groups.size(), little, task, this);
      } else if (P) {
        const auto task = [](const void* x, int64_t i) { static_cast<const TwoPasses*>(x)->one(i); };
        run_tasks(c.K * key_chunks * row_chunks, little, task, this);
        if (need_prefix) add_prefix_parts(parts, row_chunks - 1);
      }
    }
    if (!need_content) return;
    const auto task = [](const void* x, int64_t i) { static_cast<const TwoPasses*>(x)->content(i); };
    run_tasks(c.K * c.B, little, task, this);
  }
};

}  // namespace

void backward(const Call& call, const Gradients& gradients) {
  const bool content = gradients.q.data || gradients.k.data || gradients.v.data;
  if (content && !call.prefix.ids && rows_of(call) >= MANY_ROWS)
    OnePass(call, gradients).compute();
  else
    TwoPasses(call, gradients).compute();
  release_workspace();
}

}  // namespace fastprefix
