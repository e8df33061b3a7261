// The backward of 128 columns of bf16: for copies of the kernels that have a fault.
#include "backward/launches.cuh"
#include "emulated_buffers.h"

using namespace fastprefix;

extern "C" int64_t fastprefix_backward_workspace(const BackwardCall* call) {
  const char* reason = nullptr;
  return workspace_of(*call, use_device(call->forward.device, &reason), true).bytes;
}

extern "C" const char* fastprefix_backward(const BackwardCall* call, void* workspace, void* stream) {
  add_buffers(*call, workspace, fastprefix_backward_workspace(call));
  const char* reason = nullptr;
  const int count = use_device(call->forward.device, &reason);
  return launch_backward<bf16_t, HopperKernels<bf16_t, 128>>(prepare_backward(*call, workspace, count, true), stream);
}
