// The inputs that all operators have, and the plain data that kernels take in their place.
#pragma once

#include <algorithm>

#include "arguments.h"

namespace fastprefix {

using OptionalTensor = std::optional<Tensor>;

// In the order of the schema below.
#define FASTPREFIX_PARAMETERS                                                                                             \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &prefix_k, const Tensor &prefix_v,                      \
      const OptionalTensor &sinks, const OptionalTensor &padding, const OptionalTensor &segments,                         \
      const OptionalTensor &start_tensor, const OptionalTensor &prefix_ids, const OptionalTensor &prefix_lens,            \
      const OptionalTensor &prefix_bias, int64_t start, bool causal, double scale, int64_t window, double softcap,        \
      int64_t route
#define FASTPREFIX_ARGUMENTS                                                                                              \
  q, k, v, prefix_k, prefix_v, sinks, padding, segments, start_tensor, prefix_ids, prefix_lens, prefix_bias, start,       \
      causal, scale, window, softcap, route
constexpr const char* INPUTS =
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? sinks, Tensor? key_padding_mask, "
    "Tensor? segment_ids, Tensor? q_start_tensor, Tensor? prefix_ids, Tensor? prefix_lens, Tensor? prefix_bias, "
    "int q_start, bool causal, float scale, int window, float softcap, int route";

inline void read_sizes(const Shape& q, const Shape& k, const Shape& v, const Shape& prefix, bool bank, AttentionCall& call) {
  if (q.dims != 4) fail("q", std::to_string(q.dims) + " dimensions", "[B, H, S, D]");
  if (k.dims != 4) fail("k", std::to_string(k.dims) + " dimensions", "[B, H_kv, T, D]");
  if (v.dims != 4) fail("v", std::to_string(v.dims) + " dimensions", "[B, H_kv, T, D_v]");
  if (prefix.dims != 4 && prefix.dims != 3)
    fail("prefix_k", std::to_string(prefix.dims) + " dimensions", "[H_kv, P, D] or [N, H_kv, P, D]");
  if (prefix.dims == 4 && !bank) fail("prefix_ids", "none", "some, as prefix_k is a bank [N, H_kv, P, D]");
  call.B = narrow("q", q.size[0]);
  call.H = narrow("q", q.size[1]);
  call.S = narrow("q", q.size[2]);
  call.D = narrow("q", q.size[3]);
  call.H_kv = narrow("k", k.size[1]);
  call.T = narrow("k", k.size[2]);
  call.D_v = narrow("v", v.size[3]);
  call.P = narrow("prefix_k", prefix.size[prefix.dims - 2]);
  call.N = prefix.dims == 4 ? narrow("prefix_k", prefix.size[0]) : 1;
  call.packed = bank && prefix.dims == 3;
  if (call.H_kv == 0 || call.H % call.H_kv)
    fail("k", std::to_string(call.H_kv) + " heads", "a divisor of q's " + std::to_string(call.H));
  if (call.D % ELEMENTS || call.D_v % ELEMENTS)
    fail("head dim", std::to_string(call.D) + " and " + std::to_string(call.D_v), "multiples of 8");
  narrow("the number of rows, B * H * S", int64_t{1} * call.B * call.H * call.S);
}

inline AttentionCall read(FASTPREFIX_PARAMETERS) {
  AttentionCall call{};
  const Place place(q);
  const Shape q_shape(q), k_shape(k), v_shape(v), k_prefix(prefix_k), v_prefix(prefix_v);
  read_sizes(q_shape, k_shape, v_shape, k_prefix, prefix_ids.has_value(), call);
  const int64_t B = call.B, H = call.H, S = call.S, T = call.T, P = call.P;
  k_shape.expect("k", {B, call.H_kv, T, call.D});
  v_shape.expect("v", {B, call.H_kv, T, call.D_v});
  if (k_prefix.dims == 4) {
    k_prefix.expect("prefix_k", {call.N, call.H_kv, P, call.D});
    v_prefix.expect("prefix_v", {call.N, call.H_kv, P, call.D_v});
  } else {
    k_prefix.expect("prefix_k", {call.H_kv, P, call.D});
    v_prefix.expect("prefix_v", {call.H_kv, P, call.D_v});
  }
  expect_dtype("q", q, {ScalarType::BFloat16, ScalarType::Half});
  call.dtype = q.scalar_type() == ScalarType::Half ? F16 : BF16;
  call.q = rows("q", q, q_shape, q, place);
  call.k = rows("k", k, k_shape, q, place);
  call.v = rows("v", v, v_shape, q, place);
  call.prefix_k = rows("prefix_k", prefix_k, k_prefix, q, place);
  call.prefix_v = rows("prefix_v", prefix_v, v_prefix, q, place);

  call.prefix_ids = integers("prefix_ids", prefix_ids, place);
  call.prefix_lens = integers("prefix_lens", prefix_lens, place);
  call.q_start = integers("q_start", start_tensor, place);
  if (prefix_ids) {
    const Shape shape(*prefix_ids);
    call.ids_by_row = shape.dims == 2;
    if (call.ids_by_row) shape.expect("prefix_ids", {B, S});
    else shape.expect("prefix_ids", {B});
  }
  if (prefix_lens) {
    if (!prefix_ids) fail("prefix_lens", "lengths without prefix_ids", "prefix_ids, which make a bank of the prefix");
    const Shape shape(*prefix_lens);
    if (call.packed && shape.dims == 1) call.N = narrow("prefix_lens", shape.size[0]);
    shape.expect("prefix_lens", {call.N});
  } else if (call.packed) {
    fail("prefix_lens", "none", "lengths, as prefix_k is a packed bank [H_kv, P, D]");
  }
  if (start_tensor && Shape(*start_tensor).dims > 0) Shape(*start_tensor).expect("q_start", {B});
  if (sinks) {
    expect_dtype("sinks", *sinks, {ScalarType::Float});
    place.expect("sinks", *sinks);
    const Shape shape(*sinks);
    shape.expect("sinks", {H});
    shape.expect_dense("sinks");
    call.sinks = static_cast<const float*>(sinks->data_ptr());
  }
  if (prefix_bias) {
    expect_dtype("prefix_bias", *prefix_bias, {ScalarType::Float});
    place.expect("prefix_bias", *prefix_bias);
    const Shape shape(*prefix_bias);
    if (k_prefix.dims == 4) shape.expect("prefix_bias", {call.N, call.H_kv, P});
    else shape.expect("prefix_bias", {call.H_kv, P});
    if (!shape.is_empty()) {  // there is nothing that a kernel could read
      shape.expect_dense("prefix_bias");
      call.prefix_bias = static_cast<const float*>(prefix_bias->data_ptr());
    }
  }
  if (padding) {
    expect_dtype("key_padding_mask", *padding, {ScalarType::Byte});
    place.expect("key_padding_mask", *padding);
    const Shape shape(*padding);
    shape.expect("key_padding_mask", {B, T});
    call.padding = static_cast<const uint8_t*>(padding->data_ptr());
    call.padding_batch = shape.step(0);
    call.padding_key = shape.step(1);
  }
  if (segments) {
    call.segments = integers("segment_ids", segments, place);
    Shape(*segments).expect("segment_ids", {B, T});
  }
  if (route < AUTO || route > CASCADE) fail("route", std::to_string(route), "0 (auto), 1 (split_kv) or 2 (cascade)");
  call.start = start;
  call.causal = causal;
  call.scale = static_cast<float>(scale);
  // No cache has so many keys: a larger window is none, and positions can be subtracted from each other.
  call.window = std::min(narrow("window", window), MOST_KEYS);
  call.softcap = static_cast<float>(softcap);
  call.route = static_cast<Route>(route);
  call.device = q.get_device_index();
  return call;
}

}  // namespace fastprefix
