// The C interface of the backward, and all instances of its kernels for sm_90a.
#include "backward/launches.cuh"

namespace {

using namespace fastprefix;

template <class T>
const char* launch_width(const BackwardParams& params, void* stream) {
  const AttentionCall& c = params.call.forward;
  return c.D <= 64 && c.D_v <= 64 ? launch_backward<T, HopperKernels<T, 64>>(params, stream)
                                  : launch_backward<T, HopperKernels<T, 128>>(params, stream);
}

}  // namespace

extern "C" int64_t fastprefix_backward_workspace(const BackwardCall* call) {
  const char* reason = backward_refusal(*call);
  const int count = reason ? 0 : use_device(call->forward.device, &reason);
  return count ? workspace_of(*call, count, is_hopper(call->forward.device)).bytes : 0;
}

extern "C" const char* fastprefix_backward(const BackwardCall* call, void* workspace, void* stream) {
  const char* reason = backward_refusal(*call);
  const int count = reason ? 0 : use_device(call->forward.device, &reason);
  if (reason) return reason;
  const bool hopper = is_hopper(call->forward.device);
  const BackwardParams params = prepare_backward(*call, workspace, count, hopper);
  if (!hopper) return backward_sm80(params, stream);
  return call->forward.dtype == BF16 ? launch_width<bf16_t>(params, stream) : launch_width<fp16_t>(params, stream);
}
