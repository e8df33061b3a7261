// All kernels of decoding, with the emulator in the place of a device.
#include "decode.cu"
