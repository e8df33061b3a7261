// All kernels with the emulator in the place of a device, which is told of each call's memory before the launches.
#define fastprefix_decode device_decode
#define fastprefix_fused device_fused
#include "decode.cu"
#include "forward.cu"
#undef fastprefix_decode
#undef fastprefix_fused
#include "emulated_buffers.h"

extern "C" const char* fastprefix_decode(const AttentionCall* call, void* workspace, void* stream) {
  add_buffers(*call, workspace, fastprefix_decode_workspace(call));
  return device_decode(call, workspace, stream);
}

extern "C" const char* fastprefix_fused(const AttentionCall* call, void* stream) {
  add_buffers(*call, nullptr, 0);
  return device_fused(call, stream);
}
