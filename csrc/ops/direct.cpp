#include "ops/direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <bit>
#include <cmath>
#include <mutex>
#include <unordered_set>

#include "cpu/kernels.h"

namespace fastprefix {
namespace {

constexpr int64_t FARTHEST = int64_t{1} << 62;  // as in validation.py

template <typename F>
bool all_tensors(const Inputs& x, F&& holds) {
  const at::Tensor* tensors[] = {&x.q, &x.k, &x.v, &x.prefix_k, &x.prefix_v, &x.key_padding_mask, &x.segment_ids,
                                 &x.q_start_tensor, &x.sinks, &x.bias, &x.prefix_ids, &x.prefix_lens, &x.prefix_bias};
  for (const at::Tensor* tensor : tensors)
    if (tensor->defined() && !holds(*tensor)) return false;
  return true;
}

// Bits, as the difference of two key sets keeps the bits of the devices.
bool within(c10::DispatchKeySet x, c10::DispatchKeySet usual) { return (x.raw_repr() & ~usual.raw_repr()) == 0; }

bool is_watched() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  const bool autocast = !keys.excluded_.has(c10::DispatchKey::AutocastCPU);
  return autocast || !within(keys.included_, c10::default_included_set) || at::impl::torch_function_mode_enabled();
}

using c10::DispatchKey;

constexpr c10::DispatchKeySet ON_CPU({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU});
constexpr c10::DispatchKeySet ON_CUDA({DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCUDA});
constexpr c10::DispatchKeySet ON_META({DispatchKey::Meta, DispatchKey::AutogradMeta, DispatchKey::ADInplaceOrView});

// A dense tensor of a device, with no wrapper around it.
bool is_plain(const at::Tensor& x) {
  const c10::DispatchKeySet keys = x.key_set();
  return within(keys, ON_CPU) || within(keys, ON_CUDA) || within(keys, ON_META);
}

bool has_kind(const at::Tensor& x, std::initializer_list<at::ScalarType> types) {
  for (at::ScalarType type : types)
    if (x.scalar_type() == type) return true;
  return false;
}

bool is_float(const at::Tensor& x) { return has_kind(x, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}); }
bool is_whole(const at::Tensor& x) { return has_kind(x, {at::kLong, at::kInt}); }
bool has_shape(const at::Tensor& x, at::IntArrayRef sizes) { return x.sizes() == sizes; }

bool content_fits(const Inputs& x) {
  const at::Tensor &q = x.q, &k = x.k, &v = x.v;
  if (!q.defined() || !k.defined() || !v.defined() || q.dim() != 4 || k.dim() != 4 || v.dim() != 4) return false;
  if (!has_kind(q, {at::kFloat, at::kBFloat16, at::kHalf})) return false;
  if (k.scalar_type() != q.scalar_type() || v.scalar_type() != q.scalar_type()) return false;
  const int64_t H = q.size(1), K = k.size(1), D = q.size(3), E = v.size(3);
  if (q.numel() == 0 || K == 0 || H % K || D > WIDEST || E == 0 || E > WIDEST) return false;
  return k.size(0) == q.size(0) && k.size(3) == D && v.size(0) == q.size(0) && v.size(1) == K && v.size(2) == k.size(2);
}

bool prefix_fits(const Inputs& x) {
  const at::Tensor &k = x.prefix_k, &v = x.prefix_v;
  if (!k.defined() || !v.defined() || !is_float(k) || v.scalar_type() != k.scalar_type()) return false;
  const int64_t bank = k.dim() - 3;
  if (x.prefix_bias.defined() && !(is_float(x.prefix_bias) && has_shape(x.prefix_bias, k.sizes().slice(0, k.dim() - 1)))) return false;
  const bool has_ids = x.prefix_ids.defined();
  if (bank < 0 || bank > 1 || v.dim() != k.dim() || (bank && !has_ids)) return false;
  if (bank && (k.size(0) == 0 || v.size(0) != k.size(0))) return false;
  if (k.size(bank) != x.k.size(1) || v.size(bank) != x.k.size(1) || v.size(bank + 1) != k.size(bank + 1)) return false;
  if (k.size(bank + 2) != x.q.size(3) || v.size(bank + 2) != x.v.size(3)) return false;
  if (!has_ids) return !x.prefix_lens.defined();
  const int64_t B = x.q.size(0), S = x.q.size(2);
  const at::Tensor& ids = x.prefix_ids;
  if (!is_whole(ids) || !(has_shape(ids, {B}) || has_shape(ids, {B, S}))) return false;
  if (!bank && !x.prefix_lens.defined()) return false;
  const at::Tensor& lens = x.prefix_lens;
  if (lens.defined() && (!is_whole(lens) || lens.dim() != 1 || lens.size(0) == 0)) return false;
  return !bank || !lens.defined() || lens.size(0) == k.size(0);
}

// The values of ids and lengths, which are looked at on the CPU only: reading them on another device would synchronise.
bool bank_fits(const Inputs& x) {
  if (!x.prefix_ids.defined() || !x.prefix_ids.is_cpu()) return true;
  const at::Tensor ids = x.prefix_ids.to(at::kLong).contiguous();
  const bool packed = x.prefix_k.dim() == 3;
  const int64_t number = packed ? x.prefix_lens.size(0) : x.prefix_k.size(0), tokens = x.prefix_k.size(-2);
  const int64_t* data = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); i++)
    if (data[i] < -1 || data[i] >= number) return false;
  if (!x.prefix_lens.defined()) return true;
  const at::Tensor lens = x.prefix_lens.to(at::kLong).contiguous();
  int64_t all = 0;
  for (int64_t n = 0; n < number; n++) {
    const int64_t length = lens.const_data_ptr<int64_t>()[n];
    if (length < 0 || length > tokens) return false;
    all += length;
  }
  return !packed || all == tokens;
}

bool options_fit(const Inputs& x) {
  const int64_t B = x.q.size(0), H = x.q.size(1), S = x.q.size(2), T = x.k.size(2);
  if (x.key_padding_mask.defined() && !(x.key_padding_mask.scalar_type() == at::kBool && has_shape(x.key_padding_mask, {B, T})))
    return false;
  if (x.segment_ids.defined() && !(is_whole(x.segment_ids) && has_shape(x.segment_ids, {B, T}))) return false;
  const at::Tensor& start = x.q_start_tensor;
  if (start.defined() && !(is_whole(start) && (start.dim() == 0 || has_shape(start, {B})))) return false;
  if (x.q_start && (*x.q_start > FARTHEST || *x.q_start < -FARTHEST)) return false;
  if (x.window && (*x.window < 1 || *x.window > FARTHEST || !x.causal)) return false;
  if (x.softcap && !(*x.softcap > 0 && std::isfinite(*x.softcap))) return false;
  if (x.scale && !std::isfinite(*x.scale)) return false;
  if (x.sinks.defined() && !(is_float(x.sinks) && has_shape(x.sinks, {H}))) return false;
  if (x.bias.defined()) {
    if (!is_float(x.bias) && x.bias.scalar_type() != at::kBool) return false;
    const int64_t wanted[] = {T, S, H, B};
    if (x.bias.dim() > 4) return false;
    for (int64_t i = 0; i < x.bias.dim(); i++) {
      const int64_t size = x.bias.size(x.bias.dim() - 1 - i);
      if (size != 1 && size != wanted[i]) return false;
    }
  }
  return true;
}

using Signature = std::array<int64_t, 16>;

struct Hash {
  size_t operator()(const Signature& x) const {
    uint64_t found = 0;
    for (int64_t part : x) found = (found ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u, found ^= found >> 29;
    return found;
  }
};

Signature signature(const Inputs& x) {
  const auto kind = [](const at::Tensor& t) { return t.defined() ? static_cast<int64_t>(t.scalar_type()) + 1 : 0; };
  const auto rank = [](const at::Tensor& t) { return t.defined() ? t.dim() + 1 : 0; };
  const int64_t bank = x.prefix_k.dim() - 3;
  const bool scaled_down = x.scale && *x.scale <= 0.0;
  const int64_t flags = x.causal | x.key_padding_mask.defined() << 1 | x.segment_ids.defined() << 2 | x.window.has_value() << 3 |
                        x.softcap.has_value() << 4 | x.prefix_lens.defined() << 5 | x.q_start.has_value() << 6 |
                        x.q_start_tensor.defined() << 7 | scaled_down << 8;
  const int64_t rows = std::bit_width(static_cast<uint64_t>(x.k.size(2)));
  return {x.q.size(0), x.q.size(1), x.q.size(2), x.q.size(3), x.prefix_k.size(bank), x.prefix_k.size(bank + 1),
          bank ? x.prefix_k.size(0) : -1, x.v.size(3), rows, kind(x.q), kind(x.prefix_k), flags, kind(x.sinks),
          kind(x.bias), rank(x.prefix_ids), kind(x.prefix_bias)};
}

std::mutex mutex;
std::unordered_set<Signature, Hash> remembered;

}  // namespace

bool fits(const Inputs& x) {
  if (!content_fits(x) || !prefix_fits(x) || !options_fit(x)) return false;
  const c10::Device device = x.q.device();
  const auto beside_q = [&](const at::Tensor& t) { return is_plain(t) && t.device() == device; };
  return all_tensors(x, beside_q) && bank_fits(x);
}

bool is_direct(const Inputs& x) {
  if (is_watched() || !x.q.is_cpu()) return false;
  const bool recorded = at::GradMode::is_enabled();
  return all_tensors(x, [&](const at::Tensor& t) { return !(recorded && t.requires_grad()) && !t._fw_grad(0).defined(); });
}

void remember(const Inputs& x) {
  if (!content_fits(x) || !prefix_fits(x) || !x.q.is_cpu()) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (remembered.size() >= 4096) remembered.clear();
  remembered.insert(signature(x));
}

void forget() {
  const std::lock_guard<std::mutex> lock(mutex);
  remembered.clear();
}

bool is_remembered(const Inputs& x) {
  const std::lock_guard<std::mutex> lock(mutex);
  return remembered.count(signature(x)) != 0;
}

}  // namespace fastprefix
