#include <ATen/EmptyTensor.h>

#include "ops/inputs.h"

namespace fastprefix {
namespace {

// The gradient of q, k or v in fp32, in [B, S, H, D] storage.
Heads gradient_like(const at::Tensor& x, at::Tensor& to) {
  to = empty_heads(x, x.size(1), x.size(2), x.size(3), at::kFloat);
  return heads_of(to);
}

}  // namespace

std::vector<at::Tensor> gradients(const Inputs& inputs, const at::Tensor& o, const at::Tensor& lse, const at::Tensor& dout,
                                  const bool* needs) {
  const int64_t B = inputs.q.size(0), H = inputs.q.size(1), S = inputs.q.size(2), E = inputs.v.size(3);
  for (const auto& [name, x] : {std::pair("o", o), std::pair("do", dout)})
    TORCH_CHECK_VALUE(x.defined() && x.sizes() == at::IntArrayRef({B, H, S, E}), name, ": expected a tensor [B, H, S, D_v] = ",
                      at::IntArrayRef({B, H, S, E}));
  TORCH_CHECK_VALUE(lse.defined() && lse.sizes() == at::IntArrayRef({B, H, S}), "lse: expected a tensor [B, H, S] = ",
                    at::IntArrayRef({B, H, S}));
  TORCH_CHECK_VALUE(!needs[5] || inputs.prefix_bias.defined(), "prefix_bias: got None, expected the tensor whose gradient is needed");
  Prepared prepared;
  prepare(inputs, prepared);
  Call& call = prepared.call;
  const auto dense = [&](const at::Tensor& x) {
    return heads_of(x.size(-1) == 1 || x.stride(-1) == 1 ? x : prepared.owned.emplace_back(x.contiguous()));
  };
  call.o = dense(o);
  call.lse = prepared.owned.emplace_back(lse.to(at::kFloat).contiguous()).mutable_data_ptr<float>();
  Gradients g;
  g.dout = dense(dout.scalar_type() == o.scalar_type() ? dout : prepared.owned.emplace_back(dout.to(o.scalar_type())));
  std::vector<at::Tensor> found(TRAINED);
  if (needs[0]) g.q = gradient_like(inputs.q, found[0]);
  if (needs[1]) g.k = gradient_like(inputs.k, found[1]);
  if (needs[2]) g.v = gradient_like(inputs.v, found[2]);
  const bool bank = inputs.prefix_ids.defined();
  const auto prefix = [&](const at::Tensor& x, at::Tensor& to) {
    to = at::detail::empty_cpu(x.sizes(), at::kFloat);
    if (bank) to.zero_();  // tokens that nobody sees
    return to.mutable_data_ptr<float>();
  };
  if (needs[3]) g.prefix_k = prefix(inputs.prefix_k, found[3]);
  if (needs[4]) g.prefix_v = prefix(inputs.prefix_v, found[4]);
  if (needs[5]) g.prefix_bias = prefix(inputs.prefix_bias, found[5]);
  backward(call, g);
  const at::Tensor like[] = {inputs.q, inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v, inputs.prefix_bias};
  for (int i = 0; i < TRAINED; i++)
    if (needs[i]) found[i] = found[i].to(like[i].scalar_type());
  return found;
}

}  // namespace fastprefix
