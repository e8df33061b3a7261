// The kernels for devices other than Hopper of 128 columns of bf16, the forward's with prefixes in tiles of 32 keys: for
// copies that have a fault. One of two, as FORWARD says.
#ifdef FORWARD
#include "forward/launches.cuh"
#else
#include "backward/launches.cuh"
#endif
#include "emulated_buffers.h"

using namespace fastprefix;

#ifdef FORWARD

extern "C" const char* fastprefix_fused(const AttentionCall* call, void* stream) {
  add_buffers(*call, nullptr, 0);
  return launch_forward_sm80<bf16_t, 128, 32>(*call, stream);
}

#else

extern "C" int64_t fastprefix_backward_workspace(const BackwardCall* call) {
  const char* reason = nullptr;
  return workspace_of(*call, use_device(call->forward.device, &reason), false).bytes;
}

extern "C" const char* fastprefix_backward(const BackwardCall* call, void* workspace, void* stream) {
  add_buffers(*call, workspace, fastprefix_backward_workspace(call));
  const char* reason = nullptr;
  const int count = use_device(call->forward.device, &reason);
  return launch_backward<bf16_t, Sm80Kernels<bf16_t, 128>>(prepare_backward(*call, workspace, count, false), stream);
}

#endif
