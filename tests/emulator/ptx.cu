// Every function of wrappers.cuh in its PTX form, alone in a kernel of its name: it computes nothing of use. Values that
// differ between threads are loaded, for what a whole warp has in common needs no shuffle.
#include "wrappers.cuh"

using namespace fastprefix;

#define ALONE(NAME, ...) \
  extern "C" __global__ void alone_##NAME(uint32_t* p, uint32_t a, int n) { __VA_ARGS__; }
#define OF_FLOAT(NAME, Y) ALONE(NAME, const float x = ld_global(reinterpret_cast<float*>(p) + thread_index()); write(p, Y))
#define OF_INT(NAME, Y) ALONE(NAME, const int x = ld_global(reinterpret_cast<int*>(p) + thread_index()); write(p, Y))

template <class V>
FP_DEVICE void write(uint32_t* p, V x) { st_global(reinterpret_cast<V*>(p) + thread_index(), x); }
FP_DEVICE void write(uint32_t* p, const uint32_t (&x)[4]) { write(p, Bits4{{x[0], x[1], x[2], x[3]}}); }

ALONE(sync_block, sync_block())
OF_FLOAT(shfl_xor, shfl_xor(x, 1))
OF_FLOAT(shfl_idx, shfl_idx(x, n))
OF_INT(shfl_idx_int, shfl_idx(x, n))
OF_INT(shfl_up, shfl_up(x, 4))
OF_INT(vote_all, static_cast<int>(vote_all(x > n)))
OF_INT(thread_index_again, thread_index_again())
OF_FLOAT(half_to_float, half_to_float(static_cast<uint16_t>(n)))
OF_FLOAT(ex2_approx, ex2_approx(x))
OF_FLOAT(lg2_approx, lg2_approx(x))
OF_FLOAT(rcp_approx, rcp_approx(x))
OF_FLOAT(pack_bf16, pack<bf16_t>(x, 2.0f))
OF_FLOAT(pack_half, pack<half_t>(x, 2.0f))
ALONE(ld_st_global, write(p, ld_global(reinterpret_cast<const int*>(p) + a)))
ALONE(ld_st_global_2, write(p, ld_global(reinterpret_cast<const Float2*>(p) + a)))
ALONE(ld_st_global_4, write(p, ld_global(reinterpret_cast<const Float4*>(p) + a)))
ALONE(ld_shared, write(p, ld_shared(a)))
ALONE(ld_shared4, write(p, ld_shared4(a)))
ALONE(ld_shared_bits4, write(p, ld_shared_bits4(a)))
ALONE(ld_shared_int, write(p, ld_shared_int(a)))
ALONE(st_shared, st_shared(a, 1.0f))
ALONE(st_shared_int, st_shared(a, n))
ALONE(st_shared_2, st_shared(a, Float2{}))
ALONE(st_shared_4, st_shared(a, Bits4{}))
ALONE(cp_async_16, cp_async_16(a, p, n))
ALONE(cp_async_commit_group, cp_async_commit_group())
ALONE(cp_async_wait_group, cp_async_wait_group<3>())
ALONE(ldmatrix_x4, uint32_t r[4]; ldmatrix_x4(r, a); write(p, r))
ALONE(ldmatrix_x4_trans, uint32_t r[4]; ldmatrix_x4_trans(r, a); write(p, r))

template <class T>
FP_DEVICE void multiply(uint32_t* p) {
  float c[4] = {};
  const uint32_t a[4] = {p[0], p[1], p[2], p[3]};
  mma_m16n8k16<T>(c, a, p[4], p[5]);
  write(p, Float4{{c[0], c[1], c[2], c[3]}});
}
ALONE(mma_bf16, multiply<bf16_t>(p))
ALONE(mma_half, multiply<half_t>(p))
