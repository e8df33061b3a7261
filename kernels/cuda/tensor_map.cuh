// The maps by which TMA loads find boxes of a tensor. They are made on the host and passed as kernel parameters.
#pragma once

#include "hopper_wrappers.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace fastprefix {

// Null, or what a map cannot express: the driver would only say that a value is invalid.
inline const char* unsupported_by_tma(const TensorBox& tensor) {
  if (tensor.rank < 2 || tensor.rank > 5) return "TMA takes tensors of 2 to 5 dimensions";
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) return "TMA needs a tensor at an address that 16 divides";
  if (tensor.stride[0] != 1) return "TMA needs an innermost stride of 1";
  if (tensor.box[0] % 8 != 0) return "TMA needs rows of the box of whole 16 bytes";
  if (tensor.swizzle && tensor.box[0] != 64) return "a swizzled row of the box has 128 bytes";
  for (int d = 0; d < tensor.rank; d++) {
    if (tensor.size[d] < 1 || tensor.size[d] > int64_t{1} << 32) return "TMA takes sizes from 1 to 2^32";
    if (tensor.box[d] < 1 || tensor.box[d] > 256) return "TMA takes boxes of 1 to 256 elements a dimension";
    if (d == 0) continue;
    if (tensor.stride[d] < 0 || tensor.stride[d] >= int64_t{1} << 39) return "TMA takes strides below 2^40 bytes";
    if (tensor.stride[d] % 8 != 0) return "TMA needs strides that 16 bytes divide";
  }
  return nullptr;
}

#if defined(__CUDACC__)

// Null, or what is wrong. The driver's function is found at run time, so that nothing links with libcuda.
inline const char* encode_tensor_map(TensorMap* map, const TensorBox& tensor) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  if (!encode) return "this driver has no tensor maps";
  if (const char* reason = unsupported_by_tma(tensor)) return reason;
  cuuint64_t size[5], stride_bytes[4];
  cuuint32_t box[5], step[5];
  for (int d = 0; d < tensor.rank; d++) {
    size[d] = tensor.size[d];
    box[d] = tensor.box[d];
    step[d] = 1;
    if (d > 0) stride_bytes[d - 1] = tensor.stride[d] * 2;
  }
  const CUresult error = encode(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, tensor.rank, const_cast<void*>(tensor.data), size, stride_bytes, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, tensor.swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

#else

inline const char* encode_tensor_map(TensorMap* map, const TensorBox& tensor) {
  const char* reason = unsupported_by_tma(tensor);
  map->tensor = reason ? TensorBox() : tensor;
  return reason;
}

#endif

}  // namespace fastprefix
