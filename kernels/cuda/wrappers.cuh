// Every instruction that a kernel uses and that C++ does not have. A CUDA compiler gets PTX; any other gets the functions
// of the same names that run on a processor (tests/emulator/wrappers_host.hpp), so that the kernels above this file are
// one source for both. Sections are those of the PTX ISA 8.x manual.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastprefix {

// Elements of tensors, as bits. Kernels convert them with pack and compute in fp32.
struct bf16_t { uint16_t bits; };
struct half_t { uint16_t bits; };

struct alignas(8) Float2 { float x[2]; };
struct alignas(16) Float4 { float x[4]; };
struct alignas(16) Bits4 { uint32_t x[4]; };

}  // namespace fastprefix

#if defined(__CUDACC__)

#define FP_DEVICE static __device__ __forceinline__
#define FP_HOST_DEVICE static __host__ __device__ __forceinline__
#define FP_CONSTEXPR static __host__ __device__ constexpr
#define FP_UNROLL _Pragma("unroll")
#define FP_NO_UNROLL _Pragma("unroll 1")

namespace fastprefix {

FP_DEVICE int thread_index() { return threadIdx.x; }
FP_DEVICE int block_index() { return blockIdx.x; }
// The same index, read again: what follows from it is computed again too, instead of being kept in registers.
FP_DEVICE int thread_index_again() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The block's dynamic shared memory, as an address of the shared state space.
extern __shared__ __align__(1024) uint8_t dynamic_shared[];
FP_DEVICE uint32_t shared_base() { return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)); }

// 9.7.19.4 trap: ends the launch with an error.
FP_DEVICE void trap() { __trap(); }

// 9.7.13.1 barrier: every thread of the block. 9.7.13.2 bar.warp.sync: every lane of the warp.
FP_DEVICE void sync_block() { __syncthreads(); }
FP_DEVICE void sync_warp() { __syncwarp(); }

// 9.7.9.6 shfl.sync by all lanes.
FP_DEVICE float shfl_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FP_DEVICE float shfl_idx(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FP_DEVICE int shfl_idx(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// 9.7.13.7 vote.sync.all: whether x holds in all lanes.
FP_DEVICE bool vote_all(bool x) { return __all_sync(0xffffffffu, x); }
FP_DEVICE int shfl_up(int x, int delta) { return __shfl_up_sync(0xffffffffu, x, delta); }

// 9.7.3.21 ex2.approx and 9.7.3.20 lg2.approx: 2 ulp. ex2 of -inf is 0.
FP_DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FP_DEVICE float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 9.7.3.13 rcp.approx: 1 ulp. That of infinity is 0.
FP_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 9.7.9.21 cvt.rn.<type>x2.f32: two elements, the first in the low half.
template <class T>
FP_DEVICE uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16_t>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// A number by its bits: fp32, and fp16 by 9.7.9.21 cvt.
FP_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
FP_DEVICE float half_to_float(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// 9.7.9.8 ld.global and 9.7.9.11 st.global of a number or one of the structs above.
template <class V>
FP_DEVICE V ld_global(const V* p) { return *p; }
template <class V>
FP_DEVICE void st_global(V* p, V x) { *p = x; }

// ld.shared and st.shared, the address as of shared_base().
FP_DEVICE float ld_shared(uint32_t a) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(a) : "memory");
  return x;
}
FP_DEVICE Float4 ld_shared4(uint32_t a) {
  Float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x[0]), "=f"(v.x[1]), "=f"(v.x[2]), "=f"(v.x[3]) : "r"(a) : "memory");
  return v;
}
FP_DEVICE Bits4 ld_shared_bits4(uint32_t a) {
  Bits4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3]) : "r"(a) : "memory");
  return v;
}
FP_DEVICE int ld_shared_int(uint32_t a) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(a) : "memory");
  return x;
}
FP_DEVICE void st_shared(uint32_t a, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(x) : "memory"); }
FP_DEVICE void st_shared(uint32_t a, Float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(a), "f"(v.x[0]), "f"(v.x[1]) : "memory");
}
FP_DEVICE void st_shared(uint32_t a, Bits4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3]) : "memory");
}
FP_DEVICE void st_shared(uint32_t a, int x) { asm volatile("st.shared.s32 [%0], %1;" ::"r"(a), "r"(x) : "memory"); }

// 9.7.9.25.3 cp.async: 16 bytes to shared memory, of which the first `bytes` (0 or 16) are read and the rest is 0.
FP_DEVICE void cp_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
FP_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are on their way.
template <int N>
FP_DEVICE void cp_async_wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// 9.7.14.5.15 ldmatrix.x4: four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
FP_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
FP_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}

// 9.7.14.5.8 mma.m16n8k16: c += a b in fp32.
template <class T>
FP_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16_t>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastprefix

#else

#define FP_DEVICE static inline __attribute__((always_inline))
#define FP_HOST_DEVICE FP_DEVICE
#define FP_CONSTEXPR static constexpr
#define FP_UNROLL
#define FP_NO_UNROLL
#include "wrappers_host.hpp"

#endif
