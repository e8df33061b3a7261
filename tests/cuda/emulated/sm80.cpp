// The kernels for devices other than Hopper with the emulator in the place of a device.
#include "forward_sm80.cu"
#include "backward_sm80.cu"
