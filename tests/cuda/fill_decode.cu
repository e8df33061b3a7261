// Stands for the kernels of kernels/cuda where a test is about compiling, linking and launching: o and lse become 1.
#include "backward_call.h"

#include <cuda_runtime.h>

using fastprefix::AttentionCall;

__global__ void fill(AttentionCall call, uint16_t one) {
  const int64_t row = blockIdx.x;
  const int64_t b = row / (call.H * call.S), h = row / call.S % call.H, s = row % call.S;
  uint16_t* o = static_cast<uint16_t*>(call.o.data) + b * call.o.batch + h * call.o.head + s * call.o.row;
  for (int i = threadIdx.x; i < call.D_v; i += blockDim.x) o[i] = one;
  if (threadIdx.x == 0) call.lse[row] = 1.0f;
}

extern "C" int fastprefix_decode_route(const AttentionCall*) { return fastprefix::SPLIT_KV; }

extern "C" int64_t fastprefix_decode_workspace(const AttentionCall*) { return 0; }

extern "C" int64_t fastprefix_backward_workspace(const fastprefix::BackwardCall*) { return 0; }
extern "C" const char* fastprefix_backward(const fastprefix::BackwardCall*, void*, void*) { return "no gradients here"; }

extern "C" const char* fastprefix_fused(const AttentionCall* call, void* stream) {
  return fastprefix_decode(call, nullptr, stream);
}

extern "C" const char* fastprefix_decode(const AttentionCall* call, void*, void* stream) {
  fill<<<call->B * call->H * call->S, 32, 0, static_cast<cudaStream_t>(stream)>>>(
      *call, call->dtype == fastprefix::BF16 ? 0x3f80 : 0x3c00);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
