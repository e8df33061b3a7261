// All instances of the backward for devices other than Hopper.
#include "backward/launches.cuh"

namespace fastprefix {

namespace {

template <class T>
const char* launch_width(const BackwardParams& params, void* stream) {
  const AttentionCall& c = params.call.forward;
  return c.D <= 64 && c.D_v <= 64 ? launch_backward<T, Sm80Kernels<T, 64>>(params, stream)
                                  : launch_backward<T, Sm80Kernels<T, 128>>(params, stream);
}

}  // namespace

const char* backward_sm80(const BackwardParams& params, void* stream) {
  return params.call.forward.dtype == BF16 ? launch_width<bf16_t>(params, stream) : launch_width<fp16_t>(params, stream);
}

}  // namespace fastprefix
