#include "ops/inputs.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cmath>
#include <limits>

namespace fastprefix {

at::Tensor with_values(const at::Tensor& x) {
  if (x.is_neg()) return x.resolve_neg();
  if (x._is_zerotensor()) return at::zeros(x.sizes(), x.options());
  return x.is_cpu() && x.has_storage() ? x : at::Tensor();
}

namespace {

bool read_tensor(PyObject* x, bool exact, at::Tensor& to) {
  if (x == Py_None) return true;
  if (exact ? !THPVariable_CheckExact(x) : !THPVariable_Check(x)) return false;
  to = exact ? THPVariable_Unpack(x) : with_values(THPVariable_Unpack(x));
  return to.defined();
}

// Of numbers, too, Python knows subclasses, and numpy more.
bool read_number(PyObject* x, bool exact, std::optional<int64_t>& to) {
  if (x == Py_None) return true;
  if (PyBool_Check(x) || !(exact ? PyLong_CheckExact(x) : PyIndex_Check(x))) return false;
  THPObjectPtr whole(PyNumber_Index(x));
  int overflow = 0;
  if (whole) to = PyLong_AsLongLongAndOverflow(whole.get(), &overflow);
  PyErr_Clear();
  return whole && !overflow;
}

bool read_number(PyObject* x, bool exact, std::optional<double>& to) {
  if (x == Py_None) return true;
  if (PyBool_Check(x) || (exact && !PyFloat_CheckExact(x) && !PyLong_CheckExact(x))) return false;
  to = PyFloat_AsDouble(x);
  const bool failed = *to == -1.0 && PyErr_Occurred();
  PyErr_Clear();
  return !failed;
}

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16: return Type::BF16;
    case at::kHalf: return Type::F16;
    case at::kBool: return Type::BOOL;
    default: return Type::F32;
  }
}

struct Preparation {
  Prepared& to;

  at::Tensor own(at::Tensor x) { return to.owned.emplace_back(std::move(x)); }

  // With a unit stride in the last dimension.
  at::Tensor dense(const at::Tensor& x) {
    return x.size(-1) == 1 || x.stride(-1) == 1 ? x : own(x.contiguous());
  }

  // Tensors of the prefix are read in q's type, and come in any.
  at::Tensor of_prefix(const at::Tensor& x, at::ScalarType type) {
    return x.scalar_type() == at::kDouble ? own(x.to(type).contiguous()) : dense(x);
  }

  at::Tensor as_long(const at::Tensor& x) { return x.scalar_type() == at::kLong ? x : own(x.to(at::kLong)); }
};

std::vector<int64_t> whole_numbers(const at::Tensor& x) {
  const at::Tensor dense = x.to(at::kLong).contiguous();
  const int64_t* data = dense.const_data_ptr<int64_t>();
  return {data, data + dense.numel()};
}

// [N, H_kv, P, :], [H_kv, P, :] or, packed, [H_kv, P of all, :].
Heads prefix_heads(const at::Tensor& x) {
  const int64_t bank = x.dim() - 3;
  Heads found;
  found.data = static_cast<char*>(x.data_ptr());
  found.batch = bank ? x.stride(0) : 0;
  found.head = x.stride(bank);
  found.row = x.stride(bank + 1);
  found.type = type_of(x.scalar_type());
  return found;
}

void prepare_prefix(const Inputs& x, Preparation& preparation) {
  Call& c = preparation.to.call;
  Prepared& to = preparation.to;
  Prefixes& prefix = c.prefix;
  prefix.k = prefix_heads(preparation.of_prefix(x.prefix_k, x.q.scalar_type()));
  prefix.v = prefix_heads(preparation.of_prefix(x.prefix_v, x.q.scalar_type()));
  prefix.tokens = x.prefix_k.size(-2);
  if (!x.prefix_ids.defined()) {
    to.first.push_back(0);
    to.length.push_back(prefix.tokens);
  } else {
    prefix.packed = x.prefix_k.dim() == 3;
    prefix.number = prefix.packed ? x.prefix_lens.size(0) : x.prefix_k.size(0);
    to.ids = whole_numbers(x.prefix_ids);
    prefix.ids = to.ids.data();
    prefix.ids_row = x.prefix_ids.dim() == 2 ? 1 : 0;
    prefix.ids_batch = prefix.ids_row ? x.prefix_ids.size(1) : 1;
    // Checked here as well: in a compiled call nobody has seen the values.
    for (int64_t id : to.ids)
      TORCH_CHECK_VALUE(-1 <= id && id < prefix.number, "prefix_ids: got ", id, ", expected -1..", prefix.number - 1);
    to.length.assign(prefix.number, prefix.tokens);
    if (x.prefix_lens.defined()) to.length = whole_numbers(x.prefix_lens);
    int64_t first = 0;
    for (int64_t length : to.length) {
      TORCH_CHECK_VALUE(0 <= length && length <= prefix.tokens - (prefix.packed ? first : 0), "prefix_lens: got ", length,
                        ", expected lengths within ", prefix.tokens, " tokens");
      to.first.push_back(prefix.packed ? first : 0);
      first += length;
    }
  }
  if (x.prefix_bias.defined()) prefix.bias = preparation.own(x.prefix_bias.to(at::kFloat).contiguous()).const_data_ptr<float>();
  prefix.first = to.first.data();
  prefix.length = to.length.data();
}

}  // namespace

bool read_inputs(PyObject* const* arguments, bool exact, Inputs& x) {
  PyObject *causal = arguments[CAUSAL], *start = arguments[Q_START];
  if (causal != Py_True && causal != Py_False) return false;
  x.causal = causal == Py_True;
  if (!(THPVariable_Check(start) ? read_tensor(start, exact, x.q_start_tensor) : read_number(start, exact, x.q_start))) return false;
  const auto tensor = [&](Argument i, at::Tensor& to) { return read_tensor(arguments[i], exact, to); };
  return tensor(Q, x.q) && tensor(K, x.k) && tensor(V, x.v) && tensor(PREFIX_K, x.prefix_k) &&
         tensor(PREFIX_V, x.prefix_v) && tensor(KEY_PADDING_MASK, x.key_padding_mask) &&
         tensor(SEGMENT_IDS, x.segment_ids) && tensor(SINKS, x.sinks) && tensor(BIAS, x.bias) &&
         tensor(PREFIX_IDS, x.prefix_ids) && tensor(PREFIX_LENS, x.prefix_lens) && tensor(PREFIX_BIAS, x.prefix_bias) && read_number(arguments[SCALE], exact, x.scale) &&
         read_number(arguments[WINDOW], exact, x.window) && read_number(arguments[SOFTCAP], exact, x.softcap);
}

Heads heads_of(const at::Tensor& x) {
  Heads found;
  found.data = static_cast<char*>(x.data_ptr());
  found.batch = x.stride(0);
  found.head = x.stride(1);
  found.row = x.stride(2);
  found.type = type_of(x.scalar_type());
  return found;
}

at::Tensor empty_heads(const at::Tensor& like, int64_t heads, int64_t rows, int64_t width, at::ScalarType type) {
  const int64_t sizes[] = {like.size(0), heads, rows, width};
  const int64_t strides[] = {rows * heads * width, width, heads * width, 1};
  return at::detail::empty_strided_cpu(sizes, strides, type);
}

void prepare(const Inputs& x, Prepared& to) {
  Preparation preparation{to};
  Call& c = to.call;
  c.B = x.q.size(0);
  c.H = x.q.size(1);
  c.S = x.q.size(2);
  c.D = x.q.size(3);
  c.K = x.k.size(1);
  c.T = x.k.size(2);
  c.E = x.v.size(3);
  c.q = heads_of(preparation.dense(x.q));
  c.k = heads_of(preparation.dense(x.k));
  c.v = heads_of(preparation.dense(x.v));
  c.causal = x.causal;
  c.scale = static_cast<float>(x.scale ? *x.scale : 1.0 / std::sqrt(static_cast<double>(c.D)));
  // 0 stands for none.
  if (x.softcap) c.softcap = std::max(static_cast<float>(*x.softcap), std::numeric_limits<float>::min());
  c.window = x.window.value_or(0);
  prepare_prefix(x, preparation);
  if (x.q_start) to.start.assign(c.B, *x.q_start);
  if (x.q_start_tensor.defined()) {
    to.start = whole_numbers(x.q_start_tensor);
    if (x.q_start_tensor.dim() == 0) to.start.assign(c.B, to.start[0]);
  }
  if (!to.start.empty()) c.start = to.start.data();
  if (x.key_padding_mask.defined()) {
    c.padding = reinterpret_cast<const uint8_t*>(x.key_padding_mask.const_data_ptr<bool>());
    c.padding_batch = x.key_padding_mask.stride(0);
    c.padding_key = x.key_padding_mask.stride(1);
  }
  if (x.segment_ids.defined()) {
    const at::Tensor segments = preparation.as_long(x.segment_ids);
    c.segments = segments.const_data_ptr<int64_t>();
    c.segments_batch = segments.stride(0);
    c.segments_key = segments.stride(1);
  }
  if (x.sinks.defined()) c.sinks = preparation.own(x.sinks.to(at::kFloat).contiguous()).const_data_ptr<float>();
  if (x.bias.defined()) {
    const at::Tensor bias = x.bias.scalar_type() == at::kDouble ? preparation.own(x.bias.to(at::kFloat)) : x.bias;
    c.bias = bias.const_data_ptr();
    c.bias_type = type_of(bias.scalar_type());
    int64_t* strides[] = {&c.bias_key, &c.bias_row, &c.bias_head, &c.bias_batch};
    for (int64_t i = 0; i < bias.dim(); i++) {
      const int64_t dim = bias.dim() - 1 - i;
      *strides[i] = bias.size(dim) == 1 ? 0 : bias.stride(dim);
    }
  }
}

}  // namespace fastprefix
