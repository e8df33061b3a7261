// Decoding of 64 columns of bf16 alone, which compiles in a second: for copies of the kernels that have a fault.
#include "decode/launches.cuh"
#include "emulated_buffers.h"

using namespace fastprefix;

extern "C" int64_t fastprefix_decode_workspace(const AttentionCall* call) {
  const char* reason = nullptr;
  return workspace_of(*call, plan_of(*call, use_device(call->device, &reason))).bytes;
}

extern "C" const char* fastprefix_decode(const AttentionCall* call, void* workspace, void* stream) {
  add_buffers(*call, workspace, fastprefix_decode_workspace(call));
  DecodeParams params{};
  const char* reason = prepare_decode(*call, workspace, params);
  return reason ? reason : launch_decode<bf16_t, 64>(params, stream);
}
