// The arguments of the operator as torch and Python hold them.
#pragma once

#include <Python.h>

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "cpu/call.h"

namespace fastprefix {

// The Python functions take these as positional arguments, in this order.
enum Argument {
  Q, K, V, PREFIX_K, PREFIX_V, CAUSAL, SCALE, KEY_PADDING_MASK, SEGMENT_IDS, Q_START, WINDOW, SOFTCAP, SINKS, BIAS,
  PREFIX_IDS, PREFIX_LENS, PREFIX_BIAS, NUMBER_OF_ARGUMENTS
};

// Tensors are borrowed from the caller; those that are not defined were None.
struct Inputs {
  at::Tensor q, k, v, prefix_k, prefix_v, key_padding_mask, segment_ids, q_start_tensor, sinks, bias, prefix_ids,
      prefix_lens, prefix_bias;
  bool causal = true;
  std::optional<double> scale, softcap;
  std::optional<int64_t> q_start, window;
};

// False where an argument is of a kind that no call has: a symbolic number, or, where they must be `exact`, a subclass
// of torch's tensors.
bool read_inputs(PyObject* const* arguments, bool exact, Inputs& inputs);

// A tensor whose memory holds its values, which those of torch's lazily negated and zero tensors does not; undefined for
// one without memory of its own on the CPU.
at::Tensor with_values(const at::Tensor& x);

// A call and what its addresses point to.
struct Prepared {
  Call call{};
  std::vector<at::Tensor> owned;
  std::vector<int64_t> start, first, length, ids;
};

// The call of these inputs, which fit each other; o and lse are for the caller to set.
void prepare(const Inputs& inputs, Prepared& prepared);

// How many tensors can get gradients: q, k, v, prefix_k, prefix_v and prefix_bias.
constexpr int TRAINED = 6;

// Their gradients, in their types; those that are not needed stay undefined.
std::vector<at::Tensor> gradients(const Inputs& inputs, const at::Tensor& o, const at::Tensor& lse, const at::Tensor& dout,
                                  const bool* needs);

// [B, H, S, width] in [B, S, H, width] storage, as models hold it.
at::Tensor empty_heads(const at::Tensor& like, int64_t heads, int64_t rows, int64_t width, at::ScalarType type);
Heads heads_of(const at::Tensor& x);

}  // namespace fastprefix
