// A call as its fields say, one row after the other: what lies around the kernels is tested with it.
#include <cmath>
#include <cstring>
#include <vector>

#include "backward_call.h"

// What a test sets: whether results are written, and the route that AUTO takes.
extern "C" {
__attribute__((visibility("default"))) int plain_writes = 1;
__attribute__((visibility("default"))) int plain_route = 1;
}

namespace {

using namespace fastprefix;

float read(const void* data, int64_t i, Dtype dtype) {
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == F16) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
  }
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

void write(void* data, int64_t i, float value, Dtype dtype) {
  uint16_t bits;
  if (dtype == F16) {
    const _Float16 x = static_cast<_Float16>(value);
    std::memcpy(&bits, &x, 2);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  static_cast<uint16_t*>(data)[i] = bits;
}

int64_t number(const Integers& x, int64_t b, int64_t s) {
  const int64_t i = b * x.batch + s * x.row;
  return x.bytes == 4 ? static_cast<const int32_t*>(x.data)[i] : static_cast<const int64_t*>(x.data)[i];
}

struct Key {
  float score;
  int64_t value;   // where its row of v begins
  const void* v;
};

void attend(const AttentionCall& call, int64_t b, int64_t h, int64_t s) {
  const int64_t kv = h / (call.H / call.H_kv), row = b * call.q.batch + h * call.q.head + s * call.q.row;
  std::vector<Key> keys;
  const auto add = [&](const Rows& k, const Rows& v, int64_t first, int64_t first_v, int64_t j, float bias = 0) {
    if (!(bias > -1e37f)) return;
    double score = 0;
    for (int d = 0; d < call.D; d++)
      score += double{read(call.q.data, row + d, call.dtype)} * read(k.data, first + kv * k.head + j * k.row + d, call.dtype);
    score *= call.scale;
    if (call.softcap > 0) score = call.softcap * std::tanh(score / call.softcap);
    keys.push_back({static_cast<float>(score + bias), first_v + kv * v.head + j * v.row, v.data});
  };
  const int64_t id = call.prefix_ids.data ? number(call.prefix_ids, b, call.ids_by_row ? s : 0) : 0;
  if (id >= 0) {
    int64_t before = 0;
    if (call.packed)
      for (int64_t n = 0; n < id; n++) before += number(call.prefix_lens, n, 0);
    const int64_t tokens = call.prefix_lens.data ? number(call.prefix_lens, id, 0) : call.P;
    const int64_t head = (call.packed ? kv : id * call.H_kv + kv) * call.P;
    for (int64_t t = before; t < before + tokens; t++)
      add(call.prefix_k, call.prefix_v, id * call.prefix_k.batch, id * call.prefix_v.batch, t,
          call.prefix_bias ? call.prefix_bias[head + t] : 0);
  }
  const int64_t position = s + (call.q_start.data ? number(call.q_start, b, 0) : call.start);
  for (int64_t j = 0; j < call.T; j++) {
    if (call.causal && j > position) continue;
    if (call.window && j <= position - call.window) continue;
    if (call.segments.data) {
      const int64_t own = position < 0 ? 0 : position < call.T ? position : call.T - 1;
      if (number(call.segments, b, j) != number(call.segments, b, own)) continue;
    }
    if (call.padding && !call.padding[b * call.padding_batch + j * call.padding_key]) continue;
    add(call.k, call.v, b * call.k.batch, b * call.v.batch, j);
  }
  float most = call.sinks ? call.sinks[h] : -INFINITY;
  for (const Key& key : keys) most = std::fmax(most, key.score);
  double sum = call.sinks && most > -INFINITY ? std::exp(double{call.sinks[h]} - most) : 0;
  std::vector<double> o(call.D_v);
  for (const Key& key : keys) {
    const double p = std::exp(double{key.score} - most);
    sum += p;
    for (int d = 0; d < call.D_v; d++) o[d] += p * read(key.v, key.value + d, call.dtype);
  }
  for (int d = 0; d < call.D_v; d++)
    write(call.o.data, b * call.o.batch + h * call.o.head + s * call.o.row + d, sum > 0 ? o[d] / sum : 0, call.dtype);
  call.lse[(b * call.H + h) * call.S + s] = sum > 0 ? most + std::log(sum) : -INFINITY;
}

}  // namespace

extern "C" const char* fastprefix_fused(const AttentionCall* call, void*) {
  for (int64_t b = 0; b < call->B; b++)
    for (int64_t h = 0; h < call->H; h++)
      for (int64_t s = 0; s < call->S; s++) attend(*call, b, h, s);
  return nullptr;
}

extern "C" int64_t fastprefix_backward_workspace(const BackwardCall*) { return 0; }
extern "C" const char* fastprefix_backward(const BackwardCall*, void*, void*) { return "no gradients are computed here"; }

extern "C" int fastprefix_decode_route(const AttentionCall* call) { return call->route ? call->route : plain_route; }

extern "C" int64_t fastprefix_decode_workspace(const AttentionCall* call) { return 40 * int64_t{call->B}; }

// The workspace, which these rows have no use for, has to be there, aligned and, where a test looks, nan.
extern "C" const char* fastprefix_decode(const AttentionCall* call, void* workspace, void* stream) {
  if (stream) return "a stream on a processor";
  if (!workspace || reinterpret_cast<uintptr_t>(workspace) % 16) return "no workspace of the size that was asked for";
  if (!plain_writes) return std::isnan(static_cast<float*>(workspace)[10 * call->B - 1]) ? nullptr : "a workspace of numbers";
  return fastprefix_fused(call, nullptr);
}
