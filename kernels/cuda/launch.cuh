// A launch: <<<>>> with a CUDA compiler, the emulator's grid with any other. A kernel is a struct with the type Params,
// the constants THREADS, SHARED_BYTES and BLOCKS_PER_SM, and the function run(const Params&).
#pragma once

#include "wrappers.cuh"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace fastprefix {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::BLOCKS_PER_SM)
kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

// Null, or the runtime's own words. The stream is a cudaStream_t.
template <class Kernel>
const char* launch(int64_t blocks, const typename Kernel::Params& params, void* stream) {
  if (blocks <= 0) return nullptr;
  if (Kernel::SHARED_BYTES > 48 * 1024) {
    // More than the default has to be asked for, once a device.
    const cudaError_t error = cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(Kernel::SHARED_BYTES));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel_entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::THREADS, Kernel::SHARED_BYTES,
                         static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What decides how work is cut: multiprocessors of the current device; 0 with a reason where there is none.
inline int multiprocessors(const char** reason) {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  *reason = error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  return error == cudaSuccess ? count : 0;
}

}  // namespace fastprefix

#else

#include "launch_host.hpp"

#endif
