// All kernels for one type of elements. That takes half the time, for devices whose code a default build does not have.
#include "decode/launches.cuh"
#include "forward/launches.cuh"
#include "backward/launches.cuh"

namespace fastprefix {

#define DECODE(WIDTH) template const char* launch_decode<bf16_t, WIDTH>(const DecodeParams&, void*);
DECODE(64)
DECODE(128)
DECODE(256)
#define FORWARD(D, BLOCK_P) template const char* launch_forward<bf16_t, D, BLOCK_P>(const AttentionCall&, void*);
FORWARD(64, 128)
FORWARD(128, 16)
template const char* launch_backward<bf16_t, HopperKernels<bf16_t, 64>>(const BackwardParams&, void*);
template const char* launch_forward_sm80<bf16_t, 128, 32>(const AttentionCall&, void*);
template const char* launch_backward<bf16_t, Sm80Kernels<bf16_t, 128>>(const BackwardParams&, void*);

}  // namespace fastprefix
