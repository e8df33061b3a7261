// Every function of hopper_wrappers.cuh in its PTX form, to be compiled and looked at: it computes nothing of use.
#include "hopper_wrappers.cuh"

using namespace fastprefix;

// One kernel a shape, so that registers do not run out.
template <class T, bool MN_MAJOR_B, int R>
__global__ void wgmma_of_shape(float* p, uint64_t a, uint64_t b) {
  float d[R];
  uint32_t registers[4];
  for (int i = 0; i < R; i++) d[i] = p[i];
  // From memory: what ptxas computes again after the fence makes it add one more.
  for (int i = 0; i < 4; i++) registers[i] = reinterpret_cast<const uint32_t*>(p)[i + R];
  wgmma_fence();
  wgmma_ss<T, MN_MAJOR_B>(d, a, b, p != nullptr);
  wgmma_rs<T, !MN_MAJOR_B>(d, registers, b, true);
  wgmma_commit_group();
  wgmma_wait_group<0>();
  pin(d);
  for (int i = 0; i < R; i++) p[i] = d[i];
}
#define BOTH_TYPES(R)                                                               \
  template __global__ void wgmma_of_shape<bf16_t, false, R>(float*, uint64_t, uint64_t); \
  template __global__ void wgmma_of_shape<half_t, true, R>(float*, uint64_t, uint64_t);
BOTH_TYPES(8)
BOTH_TYPES(16)
BOTH_TYPES(32)
BOTH_TYPES(64)
BOTH_TYPES(96)
BOTH_TYPES(128)

__global__ void __launch_bounds__(384, 1) everything_else(const __grid_constant__ TensorMap map) {
  const uint32_t to = shared_base(), mbarrier = to + 4096;
  mbarrier_init(mbarrier, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect_tx(mbarrier, 4096);
  tma_load_2d(to, &map, mbarrier, 0, 1);
  tma_load_3d(to, &map, mbarrier, 0, 1, 2);
  tma_load_4d(to, &map, mbarrier, 0, 1, 2, 3);
  tma_load_5d(to, &map, mbarrier, 0, 1, 2, 3, 4);
  mbarrier_wait(mbarrier, 0);
  mbarrier_wait(mbarrier, 1);
  mbarrier_arrive(mbarrier);
  fence_proxy_async();
  bar_sync(1, 128);
  bar_arrive(2, 128);
  setmaxnreg_dec<24>();
  setmaxnreg_inc<240>();
}
