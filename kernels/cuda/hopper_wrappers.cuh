// The instructions that Hopper (sm_90a) added: barriers that count bytes, copies of whole boxes by the tensor memory
// accelerator (TMA), and matrix products of four warps, a warpgroup, that run while the threads do something else. A
// CUDA compiler gets PTX, and any other the functions of tests/emulator/hopper_host.hpp.
#pragma once

#include "wrappers.cuh"

namespace fastprefix {

// A tensor of 16-bit elements in global memory, innermost dimension first, and the box of it that one load copies. In
// shared memory the box's rows lie one after the other.
struct TensorBox {
  const void* data;
  int rank;           // 2 to 5
  int64_t size[5];
  int64_t stride[5];  // in elements; the innermost is 1
  int box[5];
  bool swizzle;       // Of each 8 rows of 128 bytes, row i has its 16-byte chunks permuted: chunk c lies at c ^ i.
};

// 9.7.15.5.1 matrix descriptor of an operand of wgmma in shared memory with 128-byte swizzle. K-major: rows of 64
// elements of K, 8 rows every `stride` bytes; `leading` is unused. MN-major: rows of 64 elements of M or N, one for
// each element of K, 8 rows every `stride` bytes and the next 64 elements `leading` bytes further.
FP_CONSTEXPR uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t{1} << 62 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | (address & 0x3ffff) >> 4;
}

}  // namespace fastprefix

#if defined(__CUDACC__)

#include <cuda.h>

namespace fastprefix {

using TensorMap = CUtensorMap;

// 9.7.13.15.9 mbarrier.init: a phase completes after `count` arrivals, when all expected bytes have come. The fence
// (9.7.13.4) makes it visible to copies; other threads need a barrier.
FP_DEVICE void mbarrier_init(uint32_t a, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(a), "r"(count) : "memory");
}
FP_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// 9.7.13.15.13 mbarrier.arrive, also with bytes that this phase has to wait for.
FP_DEVICE void mbarrier_arrive(uint32_t a) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(a) : "memory");
}
FP_DEVICE void mbarrier_arrive_expect_tx(uint32_t a, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(a), "r"(bytes) : "memory");
}
// 9.7.13.15.16 mbarrier.try_wait, until the phase of this parity has completed: 0 is the first phase, 1 the second. On
// a new barrier, a wait for parity 1 returns at once.
FP_DEVICE void mbarrier_wait(uint32_t a, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra AGAIN;\n"
      "DONE:\n"
      "}" ::"r"(a), "r"(parity) : "memory");
}

// 9.7.9.25.5.2 cp.async.bulk.tensor: the box whose first element has these coordinates, innermost first, to shared
// memory. What lies outside the tensor is 0. All of the box's bytes count for the mbarrier.
#define FP_TMA_LOAD(RANK, COORDINATES, ...)                                                                            \
  asm volatile("cp.async.bulk.tensor." RANK ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {"  \
               COORDINATES "}], [%2];" ::"r"(to), "l"(map), "r"(mbarrier), __VA_ARGS__ : "memory")
FP_DEVICE void tma_load_2d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1) {
  FP_TMA_LOAD("2d", "%3, %4", "r"(x0), "r"(x1));
}
FP_DEVICE void tma_load_3d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1, int x2) {
  FP_TMA_LOAD("3d", "%3, %4, %5", "r"(x0), "r"(x1), "r"(x2));
}
FP_DEVICE void tma_load_4d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1, int x2, int x3) {
  FP_TMA_LOAD("4d", "%3, %4, %5, %6", "r"(x0), "r"(x1), "r"(x2), "r"(x3));
}
FP_DEVICE void tma_load_5d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1, int x2, int x3,
                           int x4) {
  FP_TMA_LOAD("5d", "%3, %4, %5, %6, %7", "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4));
}
#undef FP_TMA_LOAD

// 9.7.13.4 fence.proxy.async: between this thread's stores to shared memory and a wgmma or copy that touches the same.
FP_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 9.7.13.1 bar.sync and bar.arrive of one of 16 barriers; sync_block is barrier 0. All `threads`, whole warps, arrive;
// those of bar.arrive do not wait.
FP_DEVICE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
FP_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 9.7.19.5 setmaxnreg: registers of each thread of the warpgroup, all of which execute this.
template <int REGISTERS>
FP_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FP_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// 9.7.15.7.1 wgmma.fence: before the first wgmma, and after other code has touched its registers.
FP_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// 9.7.15.7.2 wgmma.commit_group and 9.7.15.7.3 wgmma.wait_group: until at most N groups are on their way.
FP_DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
FP_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// After a wait: the compiler may not move what reads the registers to before it.
template <int N>
FP_DEVICE void pin(float (&r)[N]) {
  FP_UNROLL
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}

// Operands %0 to %(n-1) of an asm as text, by tens because a macro cannot count; then the accumulators that they are.
#define FP_2(ten) "%" #ten "0, %" #ten "1"
#define FP_4(ten) FP_2(ten) ", %" #ten "2, %" #ten "3"
#define FP_6(ten) FP_4(ten) ", %" #ten "4, %" #ten "5"
#define FP_8(ten) FP_6(ten) ", %" #ten "6, %" #ten "7"
#define FP_10(ten) FP_8(ten) ", %" #ten "8, %" #ten "9, "
#define FP_30(a, b, c) FP_10(a) FP_10(b) FP_10(c)
#define FP_TEXT_8 FP_8()
#define FP_TEXT_16 FP_10() FP_6(1)
#define FP_TEXT_32 FP_30(, 1, 2) FP_2(3)
#define FP_TEXT_64 FP_30(, 1, 2) FP_30(3, 4, 5) FP_4(6)
#define FP_TEXT_96 FP_30(, 1, 2) FP_30(3, 4, 5) FP_30(6, 7, 8) FP_6(9)
#define FP_TEXT_128 FP_30(, 1, 2) FP_30(3, 4, 5) FP_30(6, 7, 8) FP_30(9, 10, 11) FP_8(12)
#define FP_D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FP_D_8(i) FP_D_4(i), FP_D_4(i + 4)
#define FP_D_16(i) FP_D_8(i), FP_D_8(i + 8)
#define FP_D_32(i) FP_D_16(i), FP_D_16(i + 16)
#define FP_D_64(i) FP_D_32(i), FP_D_32(i + 32)
#define FP_D_96(i) FP_D_64(i), FP_D_32(i + 64)
#define FP_D_128(i) FP_D_64(i), FP_D_64(i + 64)

// 9.7.15.5.2 wgmma.mma_async: d = a b, or d += a b, of 64 rows, N = 2 R columns and 16 elements of K. A thread has R
// accumulators, the asm's first operands. The next are B, the descriptor of b; P, whether to accumulate; T, whether b
// is MN-major; and A, the descriptor of a, or A to A3, its registers.
#define FP_WGMMA(TYPE, N, R, TEXT_A, SCALES, B, P, T, ...)                                                             \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "."   \
               TYPE " {" FP_TEXT_##R "}, " TEXT_A ", %" #B ", p, " SCALES ", %" #T ";}"                               \
               : FP_D_##R(0)                                                                                          \
               : "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(MN_MAJOR_B)), __VA_ARGS__)
#define FP_WGMMA_SS(N, R, B, P, T, A, ...)                                                     \
  if constexpr (R == REGISTERS && std::is_same_v<Type, bf16_t>)                                \
    FP_WGMMA("bf16", N, R, "%" #A, "1, 1, 0", B, P, T, "l"(a));                                \
  else if constexpr (R == REGISTERS)                                                           \
    FP_WGMMA("f16", N, R, "%" #A, "1, 1, 0", B, P, T, "l"(a));
#define FP_WGMMA_RS(N, R, B, P, T, A, A1, A2, A3)                                              \
  if constexpr (R == REGISTERS && std::is_same_v<Type, bf16_t>)                                \
    FP_WGMMA("bf16", N, R, "{%" #A ", %" #A1 ", %" #A2 ", %" #A3 "}", "1, 1", B, P, T,         \
             "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));                                      \
  else if constexpr (R == REGISTERS)                                                           \
    FP_WGMMA("f16", N, R, "{%" #A ", %" #A1 ", %" #A2 ", %" #A3 "}", "1, 1", B, P, T,          \
             "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
#define FP_WGMMA_SHAPES(WGMMA)                              \
  WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)                    \
  WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)                 \
  WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)                 \
  WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)                \
  WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)             \
  WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)        \
  static_assert(REGISTERS == 8 || REGISTERS == 16 || REGISTERS % 32 == 0 && REGISTERS <= 128, "no such shape");

// a K-major in shared memory.
template <class Type, bool MN_MAJOR_B, int REGISTERS>
FP_DEVICE void wgmma_ss(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {
  FP_WGMMA_SHAPES(FP_WGMMA_SS)
}
// a in registers, as mma_m16n8k16's: each warp has 16 rows.
template <class Type, bool MN_MAJOR_B, int REGISTERS>
FP_DEVICE void wgmma_rs(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  FP_WGMMA_SHAPES(FP_WGMMA_RS)
}

}  // namespace fastprefix

#else

#include "hopper_host.hpp"

#endif
