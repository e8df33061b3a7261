// The kernels as operators of torch, on its stable ABI: one file serves every torch from 2.11 on and every Python.
//
// FASTPREFIX_LIBRARY names their namespace. With FASTPREFIX_EMULATED they take tensors of a processor, and what they call
// is an emulator's.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "backward_call.h"
#include "call.h"
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

// A new [B, heads, rows, width] in [B, rows, heads, width] storage, as models hold it, and where its rows lie.
Tensor empty_heads(const Tensor& q, int64_t B, int64_t heads, int64_t rows, int64_t width, Rows& place) {
  const Tensor storage = torch::stable::new_empty(q, {B, rows, heads, width});
  const int64_t sizes[4] = {B, heads, rows, width}, strides[4] = {rows * heads * width, width, heads * width, 1};
  AtenTensorHandle found = nullptr;
  check(aoti_torch__reinterpret_tensor(storage.get(), 4, sizes, strides, 0, &found));
  if (storage.numel() > 0) place = Rows{storage.data_ptr(), strides[0], strides[1], strides[2]};
  return Tensor(found);
}

// The stream to launch on, while its device is the current one.
struct Stream {
#ifdef FASTPREFIX_EMULATED
  explicit Stream(const Tensor&) {}
  void* stream = nullptr;
#else
  explicit Stream(const Tensor& x) : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
#endif
};

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
  Tensor o = empty_heads(q, call.B, call.H, call.S, call.D_v, call.o);
  Tensor lse = torch::stable::new_empty(q, {call.B, call.H, call.S}, ScalarType::Float);
  if (lse.numel() == 0) return {o, lse};
  call.lse = static_cast<float*>(lse.data_ptr());
  const Stream on(q);
  if (const char* wrong = launch(call, q, on.stream))
    throw std::runtime_error(std::string("the CUDA kernels of ") + name + ": " + wrong);
  return {o, lse};
}

std::tuple<Tensor, Tensor> decode(FASTPREFIX_PARAMETERS) {
  return forward(read(FASTPREFIX_ARGUMENTS), q, "decoding", launch_decode);
}

std::tuple<Tensor, Tensor> fused(FASTPREFIX_PARAMETERS) {
  return forward(read(FASTPREFIX_ARGUMENTS), q, "the forward", launch_fused);
}

// The gradients that are needed, in this order: those of q, k and v, in their dtype, and those of the prefix and its bias,
// in fp32. An empty tensor of one dimension stands for each of the others.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    FASTPREFIX_PARAMETERS, const Tensor& o, const Tensor& lse, const Tensor& dout, bool needs_q, bool needs_k, bool needs_v,
    bool needs_prefix_k, bool needs_prefix_v, bool needs_prefix_bias) {
  if (needs_prefix_bias && !prefix_bias) fail("prefix_bias", "none", "one, as its gradient is asked for");
  BackwardCall call{};
  AttentionCall& forward = call.forward;
  forward = read(FASTPREFIX_ARGUMENTS);
  const Place place(q);
  const int64_t B = forward.B, H = forward.H, S = forward.S;
  const Shape o_shape(o), dout_shape(dout);
  o_shape.expect("o", {B, H, S, forward.D_v});
  dout_shape.expect("do", {B, H, S, forward.D_v});
  Shape(lse).expect("lse", {B, H, S});
  expect_dtype("lse", lse, {ScalarType::Float});
  forward.o = rows("o", o, o_shape, q, place);
  call.dout = rows("do", dout, dout_shape, q, place);
  forward.lse = static_cast<float*>(lse.data_ptr());

  const Tensor none = torch::stable::new_empty(q, {0});
  Tensor dq = needs_q ? empty_heads(q, B, H, S, forward.D, call.dq) : none;
  Tensor dk = needs_k ? empty_heads(q, B, forward.H_kv, forward.T, forward.D, call.dk) : none;
  Tensor dv = needs_v ? empty_heads(q, B, forward.H_kv, forward.T, forward.D_v, call.dv) : none;
  const auto of_prefix = [&](const Tensor& x, float*& written) {
    Tensor found = torch::stable::new_empty(q, {x.numel()}, ScalarType::Float);
    written = x.numel() ? static_cast<float*>(found.data_ptr()) : nullptr;
    return found;
  };
  Tensor dprefix_k = needs_prefix_k ? of_prefix(prefix_k, call.dprefix_k) : none;
  Tensor dprefix_v = needs_prefix_v ? of_prefix(prefix_v, call.dprefix_v) : none;
  Tensor dprefix_bias = needs_prefix_bias ? of_prefix(*prefix_bias, call.dprefix_bias) : none;
  const Stream on(q);
  const int64_t bytes = fastprefix_backward_workspace(&call);
  const Tensor workspace = torch::stable::new_empty(q, {(bytes + 3) / 4}, ScalarType::Float);
  if (const char* wrong = fastprefix_backward(&call, workspace.data_ptr(), on.stream))
    throw std::runtime_error(std::string("the CUDA kernels of the backward: ") + wrong);
  return {dq, dk, dv, dprefix_k, dprefix_v, dprefix_bias};
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
  const std::string inputs = fastprefix::INPUTS, outputs = "(Tensor o, Tensor lse)";
  m.def(("decode(" + inputs + ") -> " + outputs).c_str());
  m.def(("fused(" + inputs + ") -> " + outputs).c_str());
  m.def(("decode_route(" + inputs + ") -> int").c_str());
  m.def(("backward(" + inputs +
         ", Tensor o, Tensor lse, Tensor do, bool needs_q, bool needs_k, bool needs_v, bool needs_prefix_k, "
         "bool needs_prefix_v, bool needs_prefix_bias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dprefix_k, "
         "Tensor dprefix_v, Tensor dprefix_bias)").c_str());
}

IMPLEMENT(FASTPREFIX_LIBRARY, FASTPREFIX_KEY, m) {
  m.impl("decode", TORCH_BOX(&fastprefix::decode));
  m.impl("fused", TORCH_BOX(&fastprefix::fused));
  m.impl("backward", TORCH_BOX(&fastprefix::backward));
  m.impl("decode_route", TORCH_BOX(&fastprefix::decode_route));
}
