// From tensors to the plain data of a kernel's call. Every complaint names the argument, what came and what was expected.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "attention_call.h"

namespace fastprefix {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* name, const std::string& got, const std::string& expected) {
  throw std::runtime_error(std::string(name) + ": got " + got + ", expected " + expected);
}

// torch's own macro for this is called differently in 2.11 and in 2.13.
inline void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch refused a question about a tensor");
}

// Kernels copy 16 bytes at a time, which are 8 elements.
constexpr int64_t ALIGNMENT = 16;
constexpr int64_t ELEMENTS = 8;

inline int32_t narrow(const char* name, int64_t x) {
  if (x < 0 || x > std::numeric_limits<int32_t>::max())
    fail(name, std::to_string(x), "a whole number from 0 to " + std::to_string(std::numeric_limits<int32_t>::max()));
  return static_cast<int32_t>(x);
}

inline std::string sizes_of(const int64_t* begin, const int64_t* end) {
  std::string text = "[";
  for (const int64_t* x = begin; x != end; x++) text += (x == begin ? "" : ", ") + std::to_string(*x);
  return text + "]";
}

// Sizes and strides of a tensor, borrowed from it.
struct Shape {
  const int64_t *size, *stride;
  int64_t dims;

  explicit Shape(const Tensor& x) : size(x.sizes().data()), stride(x.strides().data()), dims(x.dim()) {}

  // 0 along a dimension of one element, whatever stride torch gives that.
  int64_t step(int64_t dim) const { return size[dim] > 1 ? stride[dim] : 0; }

  bool is_empty() const {
    for (int64_t i = 0; i < dims; i++)
      if (size[i] == 0) return true;
    return false;
  }

  // Of a tensor that is not empty.
  void expect_dense(const char* name) const {
    int64_t wanted = 1;
    for (int64_t i = dims - 1; i >= 0; wanted *= size[i--])
      if (size[i] > 1 && stride[i] != wanted) fail(name, "the stride " + std::to_string(stride[i]), std::to_string(wanted));
  }

  void expect(const char* name, std::initializer_list<int64_t> wanted) const {
    bool same = dims == static_cast<int64_t>(wanted.size());
    for (int64_t i = 0; same && i < dims; i++) same = size[i] == wanted.begin()[i];
    if (!same) fail(name, "sizes " + sizes_of(size, size + dims), sizes_of(wanted.begin(), wanted.end()));
  }
};

struct Place {
  int32_t type, index;

  explicit Place(const Tensor& x) : index(x.get_device_index()) {
    check(aoti_torch_get_device_type(x.get(), &type));
  }

  void expect(const char* name, const Tensor& x) const {
    const Place own(x);
    if (own.type != type || own.index != index)
      fail(name, "device " + own.text(), "q's device " + text());
  }

  std::string text() const {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    const std::string kind = type == aoti_torch_device_type_cuda() ? "cuda" : "type " + std::to_string(type);
    return kind + ":" + std::to_string(index);
  }
};

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "number " + std::to_string(static_cast<int>(type));
  }
}

inline void expect_dtype(const char* name, const Tensor& x, std::initializer_list<ScalarType> wanted) {
  const ScalarType own = x.scalar_type();
  std::string all;
  for (const ScalarType type : wanted) {
    if (type == own) return;
    all += (all.empty() ? "" : " or ") + name_of(type);
  }
  fail(name, "dtype " + name_of(own), all);
}

// Rows of elements, [batch, head, row, width], or [head, row, width] with the batch stride 0.
inline Rows rows(const char* name, const Tensor& x, const Shape& shape, const Tensor& q, const Place& place) {
  expect_dtype(name, x, {q.scalar_type()});
  place.expect(name, x);
  const int64_t last = shape.dims - 1;
  Rows found{x.data_ptr(), shape.dims == 4 ? shape.step(0) : 0, shape.step(last - 2), shape.step(last - 1)};
  if (shape.is_empty()) return found;  // there is nothing that a kernel could read
  if (shape.step(last) != 1) fail(name, "the last stride " + std::to_string(shape.stride[last]), "1");
  for (const int64_t stride : {found.batch, found.head, found.row})
    if (stride % ELEMENTS) fail(name, "the stride " + std::to_string(stride), "a multiple of 8 elements");
  if (reinterpret_cast<uintptr_t>(found.data) % ALIGNMENT) fail(name, "an address off by some bytes", "a multiple of 16 bytes");
  return found;
}

// Whole numbers, [batch] or [batch, row]; [] is one for every batch.
inline Integers integers(const char* name, const std::optional<Tensor>& x, const Place& place) {
  if (!x) return Integers{nullptr, 0, 0, 0};
  expect_dtype(name, *x, {ScalarType::Int, ScalarType::Long});
  place.expect(name, *x);
  const Shape shape(*x);
  return Integers{x->data_ptr(), x->scalar_type() == ScalarType::Int ? 4 : 8, shape.dims > 0 ? shape.step(0) : 0,
                  shape.dims > 1 ? shape.step(1) : 0};
}

}  // namespace fastprefix
