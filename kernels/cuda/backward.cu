// The C interface of the backward for sm_90a, and all instances of its kernels.
#include "backward/launches.cuh"

namespace {

using namespace fastprefix;

template <class T>
const char* launch_width(const BackwardParams& params, int multiprocessors, void* stream) {
  const AttentionCall& c = params.call.forward;
  return c.D <= 64 && c.D_v <= 64 ? launch_backward<T, 64>(params, multiprocessors, stream)
                                  : launch_backward<T, 128>(params, multiprocessors, stream);
}

}  // namespace

extern "C" int64_t fastprefix_backward_workspace(const BackwardCall* call) {
  const char* reason = backward_refusal(*call);
  const int count = reason ? 0 : use_device(call->forward.device, &reason);
  return count ? workspace_of(*call, count).bytes : 0;
}

extern "C" const char* fastprefix_backward(const BackwardCall* call, void* workspace, void* stream) {
  const char* reason = backward_refusal(*call);
  const int count = reason ? 0 : use_device(call->forward.device, &reason);
  if (reason) return reason;
  const BackwardParams params = prepare_backward(*call, workspace, count);
  return call->forward.dtype == BF16 ? launch_width<bf16_t>(params, count, stream) : launch_width<fp16_t>(params, count, stream);
}
