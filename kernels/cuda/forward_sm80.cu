// All instances of the forward for devices other than Hopper.
#include "forward/launches.cuh"

namespace fastprefix {

namespace {

template <class T, int D>
const char* launch_tile(const AttentionCall& call, void* stream) {
  return prefix_tile(call) == 16 ? launch_forward_sm80<T, D, 16>(call, stream) : launch_forward_sm80<T, D, D == 128 ? 32 : 64>(call, stream);
}

template <class T>
const char* launch_width(const AttentionCall& call, void* stream) {
  return call.D <= 64 && call.D_v <= 64 ? launch_tile<T, 64>(call, stream) : launch_tile<T, 128>(call, stream);
}

}  // namespace

const char* forward_sm80(const AttentionCall& call, void* stream) {
  return call.dtype == BF16 ? launch_width<bf16_t>(call, stream) : launch_width<fp16_t>(call, stream);
}

}  // namespace fastprefix
