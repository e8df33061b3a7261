// All kernels of the backward with the emulator in the place of a device.
#define fastprefix_backward device_backward
#include "backward.cu"
#undef fastprefix_backward
#include "emulated_buffers.h"

extern "C" const char* fastprefix_backward(const BackwardCall* call, void* workspace, void* stream) {
  add_buffers(*call, workspace, fastprefix_backward_workspace(call));
  return device_backward(call, workspace, stream);
}
