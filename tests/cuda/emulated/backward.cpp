// All kernels of the backward with the emulator in the place of a device; tests tell it of each call's memory.
#include "backward.cu"
