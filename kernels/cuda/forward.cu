// The C interface of the forward, and all instances of its kernel for sm_90a.
#include "forward/launches.cuh"

namespace {

using namespace fastprefix;

template <class T, int D>
const char* launch_tile(const AttentionCall& call, void* stream) {
  switch (prefix_tile(call)) {
    case 16: return launch_forward<T, D, 16>(call, stream);
    case 64: return launch_forward<T, D, 64>(call, stream);
    default: return launch_forward<T, D, 128>(call, stream);
  }
}

template <class T>
const char* launch_width(const AttentionCall& call, void* stream) {
  return call.D <= 64 && call.D_v <= 64 ? launch_tile<T, 64>(call, stream) : launch_tile<T, 128>(call, stream);
}

}  // namespace

extern "C" const char* fastprefix_fused(const AttentionCall* call, void* stream) {
  const char* reason = forward_refusal(*call);
  if (!reason) use_device(call->device, &reason);
  if (reason) return reason;
  if (!is_hopper(call->device)) return forward_sm80(*call, stream);
  return call->dtype == BF16 ? launch_width<bf16_t>(*call, stream) : launch_width<fp16_t>(*call, stream);
}
