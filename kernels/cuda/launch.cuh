// A launch: <<<>>> with a CUDA compiler, the emulator's grid with any other. A kernel is a struct with the type Params,
// the constants THREADS, SHARED_BYTES and BLOCKS_PER_SM, and the function run(const Params&).
#pragma once

#include "wrappers.cuh"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <atomic>

namespace fastprefix {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::BLOCKS_PER_SM)
kernel_entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}

constexpr int MOST_DEVICES = 64;   // of which something is remembered

// More shared memory than by default has to be asked for, once a kernel and device.
template <class Kernel>
cudaError_t allow_shared_memory(int device) {
  if (Kernel::SHARED_BYTES <= 48 * 1024) return cudaSuccess;
  static std::atomic<bool> allowed[MOST_DEVICES];
  const bool remembered = device < MOST_DEVICES;
  if (remembered && allowed[device].load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(Kernel::SHARED_BYTES));
  if (remembered && error == cudaSuccess) allowed[device].store(true, std::memory_order_relaxed);
  return error;
}

// Null, or the runtime's own words. The device is the current one, and the stream, a cudaStream_t, is of it.
template <class Kernel>
const char* launch(int64_t blocks, const typename Kernel::Params& params, void* stream) {
  if (blocks <= 0) return nullptr;
  if (blocks > 0x7fffffff) return "more blocks than a launch has";
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = allow_shared_memory<Kernel>(device);
  if (error == cudaSuccess) {
    kernel_entry<Kernel><<<static_cast<unsigned>(blocks), Kernel::THREADS, Kernel::SHARED_BYTES,
                           static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();   // or the next launch would be told of it
  return cudaGetErrorString(error);
}

// One of a device's numbers, which is asked for once.
template <cudaDeviceAttr ATTRIBUTE>
cudaError_t device_attribute(int device, int& value) {
  static std::atomic<int> known[MOST_DEVICES];
  value = device < MOST_DEVICES ? known[device].load(std::memory_order_relaxed) : 0;
  if (value != 0) return cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(&value, ATTRIBUTE, device);
  if (error == cudaSuccess && device < MOST_DEVICES) known[device].store(value, std::memory_order_relaxed);
  return error;
}

// Makes a device the current one of this library's runtime, which is another than torch's. Its number of multiprocessors,
// by which work is cut; 0 and a reason where there is none.
inline int use_device(int device, const char** reason) {
  int count = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = device_attribute<cudaDevAttrMultiProcessorCount>(device, count);
  *reason = error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? count : 0;
}

// Whether a device that is in use has Hopper's instructions, and this library code for them (FASTPREFIX_HOPPER).
inline bool is_hopper(int device) {
#if defined(FASTPREFIX_HOPPER)
  int major = 0;
  return device_attribute<cudaDevAttrComputeCapabilityMajor>(device, major) == cudaSuccess && major == 9;
#else
  static_cast<void>(device);
  return false;
#endif
}

}  // namespace fastprefix

#else

#include "launch_host.hpp"

#endif

namespace fastprefix {

// fp16's kernels are bf16's but for two instructions: who looks at what a compiler makes of them can leave them out.
#if defined(FASTPREFIX_ONLY_BF16)
using fp16_t = bf16_t;
#else
using fp16_t = half_t;
#endif

}  // namespace fastprefix
