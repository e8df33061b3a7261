// The kernels as operators of torch, on its stable ABI: one file serves every torch from 2.11 on and every Python.
//
// FASTPREFIX_LIBRARY names their namespace. With FASTPREFIX_EMULATED they take tensors of a processor, and what they call
// is an emulator's.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "arguments.h"
#include "current_stream.h"

#ifndef FASTPREFIX_LIBRARY
#define FASTPREFIX_LIBRARY fastprefix_cuda
#endif
#ifdef FASTPREFIX_EMULATED
#define FASTPREFIX_KEY CPU
#else
#define FASTPREFIX_KEY CUDA
#endif

namespace fastprefix {
namespace {

using OptionalTensor = std::optional<Tensor>;

// In the order of the schema below.
#define FASTPREFIX_PARAMETERS                                                                                             \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &prefix_k, const Tensor &prefix_v,                      \
      const OptionalTensor &sinks, const OptionalTensor &padding, const OptionalTensor &segments,                         \
      const OptionalTensor &start_tensor, const OptionalTensor &prefix_ids, const OptionalTensor &prefix_lens, int64_t start,   \
      bool causal, double scale, int64_t window, double softcap, int64_t route
#define FASTPREFIX_ARGUMENTS                                                                                              \
  q, k, v, prefix_k, prefix_v, sinks, padding, segments, start_tensor, prefix_ids, prefix_lens, start, causal, scale,     \
      window, softcap, route
constexpr const char* SCHEMA =
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? sinks, Tensor? key_padding_mask, "
    "Tensor? segment_ids, Tensor? q_start_tensor, Tensor? prefix_ids, Tensor? prefix_lens, int q_start, bool causal, float scale, int window, "
    "float softcap, int route) -> ";

void read_sizes(const Shape& q, const Shape& k, const Shape& v, const Shape& prefix, bool bank, AttentionCall& call) {
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

AttentionCall read(FASTPREFIX_PARAMETERS) {
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
    if (H > 1 && shape.stride[0] != 1) fail("sinks", "the stride " + std::to_string(shape.stride[0]), "1");
    call.sinks = static_cast<const float*>(sinks->data_ptr());
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
  call.window = narrow("window", window);
  call.softcap = static_cast<float>(softcap);
  call.route = static_cast<Route>(route);
  call.device = q.get_device_index();
  return call;
}

// [B, H, S, D_v] in [B, S, H, D_v] storage, as models hold it.
Tensor with_heads_first(const Tensor& x, const AttentionCall& call) {
  const int64_t sizes[4] = {call.B, call.H, call.S, call.D_v};
  const int64_t row = int64_t{1} * call.H * call.D_v;
  const int64_t strides[4] = {row * call.S, call.D_v, row, 1};
  AtenTensorHandle found = nullptr;
  check(aoti_torch__reinterpret_tensor(x.get(), 4, sizes, strides, 0, &found));
  return Tensor(found);
}

// Launches a call whose outputs are there, on a stream; null, or what is wrong.
using Launch = const char* (*)(const AttentionCall&, const Tensor& q, void* stream);

const char* launch_decode(const AttentionCall& call, const Tensor& q, void* stream) {
  const int64_t bytes = fastprefix_decode_workspace(&call);
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = torch::stable::new_empty(q, {(bytes + 3) / 4}, ScalarType::Float);
  return fastprefix_decode(&call, workspace ? workspace->data_ptr() : nullptr, stream);
}

const char* launch_fused(const AttentionCall& call, const Tensor&, void* stream) { return fastprefix_fused(&call, stream); }

std::tuple<Tensor, Tensor> forward(AttentionCall call, const Tensor& q, const char* name, Launch launch) {
  // Allocated by the operators that fill new memory with nan where that is asked for.
  const Tensor storage = torch::stable::new_empty(q, {call.B, call.S, call.H, call.D_v});
  Tensor lse = torch::stable::new_empty(q, {call.B, call.H, call.S}, ScalarType::Float);
  Tensor o = with_heads_first(storage, call);
  if (lse.numel() == 0) return {o, lse};
  call.o = Rows{storage.data_ptr(), int64_t{1} * call.S * call.H * call.D_v, call.D_v, int64_t{1} * call.H * call.D_v};
  call.lse = static_cast<float*>(lse.data_ptr());
#ifdef FASTPREFIX_EMULATED
  void* stream = nullptr;
#else
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = current_stream(device);
#endif
  if (const char* wrong = launch(call, q, stream)) throw std::runtime_error(std::string("the CUDA kernels of ") + name + ": " + wrong);
  return {o, lse};
}

std::tuple<Tensor, Tensor> decode(FASTPREFIX_PARAMETERS) {
  return forward(read(FASTPREFIX_ARGUMENTS), q, "decoding", launch_decode);
}

std::tuple<Tensor, Tensor> fused(FASTPREFIX_PARAMETERS) {
  return forward(read(FASTPREFIX_ARGUMENTS), q, "the forward", launch_fused);
}

int64_t decode_route(FASTPREFIX_PARAMETERS) {
  const AttentionCall call = read(FASTPREFIX_ARGUMENTS);
#ifndef FASTPREFIX_EMULATED
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
#endif
  const int found = fastprefix_decode_route(&call);
  if (found != SPLIT_KV && found != CASCADE) throw std::runtime_error("the CUDA kernels of decoding have no route");
  return found;
}

}  // namespace
}  // namespace fastprefix

// The macros of torch paste the name that they are given, so it is replaced by its value first.
#define DEFINE(name, m) STABLE_TORCH_LIBRARY(name, m)
#define IMPLEMENT(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

DEFINE(FASTPREFIX_LIBRARY, m) {
  m.def((std::string("decode") + fastprefix::SCHEMA + "(Tensor o, Tensor lse)").c_str());
  m.def((std::string("fused") + fastprefix::SCHEMA + "(Tensor o, Tensor lse)").c_str());
  m.def((std::string("decode_route") + fastprefix::SCHEMA + "int").c_str());
}

IMPLEMENT(FASTPREFIX_LIBRARY, FASTPREFIX_KEY, m) {
  m.impl("decode", TORCH_BOX(&fastprefix::decode));
  m.impl("fused", TORCH_BOX(&fastprefix::fused));
  m.impl("decode_route", TORCH_BOX(&fastprefix::decode_route));
}
