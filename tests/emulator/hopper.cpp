// One kernel for each fault with Hopper's instructions that the emulator names, with it and without; then kernels that
// show what these instructions compute.
#include <cstring>

#include "launch.cuh"
#include "tensor_map.cuh"

namespace fastprefix {

// `in` is a tensor of 64 x 64 elements of 16 bits, `out` has 256 numbers.
struct Params_ {
  float* out;
  TensorMap in;
};

template <int THREADS_>
struct Case {
  using Params = Params_;
  static constexpr int THREADS = THREADS_, BLOCKS_PER_SM = 1;
  static constexpr uint32_t SHARED_BYTES = 32768;
};

constexpr int BOX_BYTES = 64 * 64 * 2;
FP_DEVICE uint32_t box(int i) { return shared_base() + i * BOX_BYTES; }
FP_DEVICE uint32_t mbarrier(int i) { return shared_base() + 24576 + 8 * i; }
FP_DEVICE uint64_t descriptor_of(uint32_t a) { return matrix_descriptor(a, 16, 1024); }
FP_DEVICE void make_mbarriers(int count) {
  if (thread_index() == 0) {
    for (int i = 0; i < 2; i++) mbarrier_init(mbarrier(i), count);
    fence_mbarrier_init();
  }
  sync_block();
}
FP_DEVICE void load_box(const Params_& p, uint32_t to, int bytes = BOX_BYTES) {
  mbarrier_arrive_expect_tx(mbarrier(0), bytes);
  tma_load_2d(to, &p.in, mbarrier(0), 0, 0);
}
FP_DEVICE void fill_with_zeros(int boxes) {
  for (int i = thread_index(); i < boxes * BOX_BYTES / 4; i += 128) st_shared(shared_base() + 4 * i, 0.f);
}
FP_DEVICE void zeros_for_wgmma(int boxes) {
  fill_with_zeros(boxes);
  fence_proxy_async();
  sync_block();
}

// ---- mbarriers and TMA

template <bool BROKEN>
struct no_mbarrier_wait : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) load_box(p, box(0));
    if (!BROKEN) mbarrier_wait(mbarrier(0), 0);
    st_global(p.out + thread_index(), ld_shared(box(0)));
    mbarrier_wait(mbarrier(0), 0);
  }
};
template <bool BROKEN>
struct wait_for_wrong_parity : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) load_box(p, box(0));
    mbarrier_wait(mbarrier(0), 0);
    // The second phase never completes.
    mbarrier_wait(mbarrier(0), BROKEN ? 1 : 0);
  }
};
template <bool BROKEN>
struct parity_of_two : Case<32> {
  FP_DEVICE void run(const Params_&) {
    make_mbarriers(1);
    mbarrier_wait(mbarrier(0), BROKEN ? 2 : 1);
  }
};
template <bool BROKEN>
struct no_fence_of_init : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    if (thread_index() == 0) {
      mbarrier_init(mbarrier(0), 1);
      if (!BROKEN) fence_mbarrier_init();
      load_box(p, box(0));
      mbarrier_wait(mbarrier(0), 0);
    }
  }
};
template <bool BROKEN>
struct no_barrier_after_init : Case<64> {
  FP_DEVICE void run(const Params_&) {
    if (thread_index() == 0) mbarrier_init(mbarrier(0), 1);
    if (!BROKEN) sync_block();
    if (thread_index() == 32) mbarrier_arrive(mbarrier(0));
  }
};
template <bool BROKEN>
struct no_init : Case<32> {
  FP_DEVICE void run(const Params_&) {
    if (!BROKEN) make_mbarriers(32);
    mbarrier_arrive(mbarrier(0));
  }
};
template <bool BROKEN>
struct too_many_arrivals : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) {
      mbarrier_arrive_expect_tx(mbarrier(0), BOX_BYTES);
      if (BROKEN) mbarrier_arrive(mbarrier(0));
      tma_load_2d(box(0), &p.in, mbarrier(0), 0, 0);
    }
    mbarrier_wait(mbarrier(0), 0);
  }
};
template <bool BROKEN>
struct too_many_bytes_expected : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) load_box(p, box(0), BOX_BYTES + (BROKEN ? 16 : 0));
    mbarrier_wait(mbarrier(0), 0);
  }
};
template <bool BROKEN>
struct released_too_early : Case<64> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) {
      load_box(p, box(0));
      mbarrier_wait(mbarrier(1), 0);
      load_box(p, box(0));
      mbarrier_wait(mbarrier(0), 1);
    } else if (thread_index() == 32) {
      mbarrier_wait(mbarrier(0), 0);
      if (BROKEN) mbarrier_arrive(mbarrier(1));
      st_global(p.out, ld_shared(box(0)));
      if (!BROKEN) mbarrier_arrive(mbarrier(1));
    }
  }
};
template <bool BROKEN>
struct box_over_stores : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) {
      st_shared(box(0), 1.f);
      if (!BROKEN) fence_proxy_async();
      load_box(p, box(0));
      mbarrier_wait(mbarrier(0), 0);
    }
  }
};
template <bool BROKEN>
struct exit_before_box : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) load_box(p, box(0));
    if (!BROKEN) mbarrier_wait(mbarrier(0), 0);
  }
};
template <bool BROKEN>
struct misaligned_box : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) load_box(p, box(0) + (BROKEN ? 128 : 0));
    if (!BROKEN) mbarrier_wait(mbarrier(0), 0);
  }
};
template <bool BROKEN>
struct box_outside_shared : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() == 0) load_box(p, box(BROKEN ? 4 : 0));
    if (!BROKEN) mbarrier_wait(mbarrier(0), 0);
  }
};
template <bool BROKEN>
struct box_of_wrong_rank : Case<32> {
  FP_DEVICE void run(const Params_& p) {
    make_mbarriers(1);
    if (thread_index() != 0) return;
    mbarrier_arrive_expect_tx(mbarrier(0), BROKEN ? 0 : BOX_BYTES);
    if (BROKEN)
      tma_load_3d(box(0), &p.in, mbarrier(0), 0, 0, 0);
    else
      tma_load_2d(box(0), &p.in, mbarrier(0), 0, 0);
    mbarrier_wait(mbarrier(0), 0);
  }
};

// ---- barriers of some warps, and registers

template <bool BROKEN>
struct unequal_barrier : Case<128> {
  FP_DEVICE void run(const Params_&) { bar_sync(1, BROKEN && thread_index() >= 64 ? 96 : 128); }
};
template <bool BROKEN>
struct wrong_named_barrier : Case<64> {
  FP_DEVICE void run(const Params_& p) {
    const int t = thread_index();
    if (t < 32) {
      st_shared(shared_base() + 4 * t, 1.f);
      bar_arrive(1, 64);
      if (BROKEN) st_shared(shared_base() + 4 * t, 2.f);
    } else {
      bar_sync(1, 64);
      st_global(p.out + t, ld_shared(shared_base() + 4 * (t - 32)));
    }
  }
};
template <bool BROKEN>
struct too_many_registers : Case<384> {
  FP_DEVICE void run(const Params_&) {
    if (BROKEN || thread_index() >= 128)
      setmaxnreg_inc<240>();
    else
      setmaxnreg_dec<24>();
  }
};

// ---- wgmma

template <bool BROKEN>
struct no_proxy_fence : Case<128> {
  FP_DEVICE void run(const Params_&) {
    fill_with_zeros(2);
    if (!BROKEN) fence_proxy_async();
    sync_block();
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), descriptor_of(box(1)), false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
};
template <bool BROKEN>
struct no_barrier_before_wgmma : Case<128> {
  FP_DEVICE void run(const Params_&) {
    fill_with_zeros(2);
    fence_proxy_async();
    if (!BROKEN) sync_block();
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), descriptor_of(box(1)), false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
};
template <bool BROKEN>
struct no_wgmma_fence : Case<128> {
  FP_DEVICE void run(const Params_&) {
    zeros_for_wgmma(2);
    float d[32];
    if (!BROKEN) wgmma_fence();
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), descriptor_of(box(1)), false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
};
template <bool BROKEN>
struct exit_before_wgmma : Case<128> {
  FP_DEVICE void run(const Params_&) {
    zeros_for_wgmma(2);
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), descriptor_of(box(1)), false);
    wgmma_commit_group();
    if (!BROKEN) wgmma_wait_group<0>();
  }
};
template <bool BROKEN>
struct accumulator_written_in_flight : Case<128> {
  FP_DEVICE void run(const Params_&) {
    zeros_for_wgmma(2);
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), descriptor_of(box(1)), false);
    wgmma_commit_group();
    if (BROKEN) d[3] = 1.f;
    wgmma_wait_group<0>();
    if (!BROKEN) d[3] = 1.f;
  }
};
template <bool BROKEN>
struct operand_register_written_in_flight : Case<128> {
  FP_DEVICE void run(const Params_&) {
    zeros_for_wgmma(1);
    float d[32];
    uint32_t a[4] = {};
    wgmma_fence();
    wgmma_rs<bf16_t, false>(d, a, descriptor_of(box(0)), false);
    wgmma_commit_group();
    if (BROKEN) a[2] = 1;
    wgmma_wait_group<0>();
    if (!BROKEN) a[2] = 1;
  }
};
template <bool BROKEN>
struct operand_written_in_flight : Case<128> {
  FP_DEVICE void run(const Params_&) {
    zeros_for_wgmma(2);
    float d[32];
    wgmma_fence();
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), descriptor_of(box(1)), false);
    wgmma_commit_group();
    if (BROKEN && thread_index() == 5) st_shared(box(1), 1.f);
    wgmma_wait_group<0>();
    sync_block();
    if (!BROKEN && thread_index() == 5) st_shared(box(1), 1.f);
  }
};
template <bool BROKEN>
struct operands_that_differ : Case<128> {
  FP_DEVICE void run(const Params_&) {
    zeros_for_wgmma(3);
    float d[32];
    wgmma_fence();
    const uint32_t b = box(BROKEN && thread_index() >= 32 ? 2 : 1);
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), descriptor_of(b), false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
};
template <bool BROKEN>
struct descriptor_without_swizzle : Case<128> {
  FP_DEVICE void run(const Params_&) {
    zeros_for_wgmma(2);
    float d[32];
    wgmma_fence();
    const uint64_t b = descriptor_of(box(1)) & ~(uint64_t{BROKEN} << 62);
    wgmma_ss<bf16_t, false>(d, descriptor_of(box(0)), b, false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
};
template <bool BROKEN>
struct divergent_warpgroup : Case<128> {
  FP_DEVICE void run(const Params_&) {
    if (BROKEN && thread_index() >= 64)
      wgmma_commit_group();
    else
      wgmma_fence();
  }
};

struct Named {
  const char* name;
  const char* (*correct)(const Params_&);
  const char* (*broken)(const Params_&);
};
template <class Kernel>
const char* launch_case(const Params_& p) {
  return launch<Kernel>(1, p, nullptr);
}
#define CASE(name) \
  { #name, launch_case<name<false>>, launch_case<name<true>> }
static const Named cases[] = {
    CASE(no_mbarrier_wait),
    CASE(wait_for_wrong_parity),
    CASE(parity_of_two),
    CASE(no_fence_of_init),
    CASE(no_barrier_after_init),
    CASE(no_init),
    CASE(too_many_arrivals),
    CASE(too_many_bytes_expected),
    CASE(released_too_early),
    CASE(box_over_stores),
    CASE(exit_before_box),
    CASE(misaligned_box),
    CASE(box_outside_shared),
    CASE(box_of_wrong_rank),
    CASE(unequal_barrier),
    CASE(wrong_named_barrier),
    CASE(too_many_registers),
    CASE(no_proxy_fence),
    CASE(no_barrier_before_wgmma),
    CASE(no_wgmma_fence),
    CASE(exit_before_wgmma),
    CASE(accumulator_written_in_flight),
    CASE(operand_register_written_in_flight),
    CASE(operand_written_in_flight),
    CASE(operands_that_differ),
    CASE(descriptor_without_swizzle),
    CASE(divergent_warpgroup),
};

// ---- values

// A box of a tensor of any rank to shared memory, and from there in order to out: [bytes / 4].
struct BoxParams {
  TensorMap in;
  uint32_t* out;
  int rank, bytes, first[5];
};
struct BoxKernel {
  using Params = BoxParams;
  static constexpr int THREADS = 32, BLOCKS_PER_SM = 1;
  static constexpr uint32_t SHARED_BYTES = 32768;
  FP_DEVICE void run(const Params& p) {
    const int* x = p.first;
    make_mbarriers(1);
    if (thread_index() == 0) {
      mbarrier_arrive_expect_tx(mbarrier(0), p.bytes);
      if (p.rank == 2) tma_load_2d(box(0), &p.in, mbarrier(0), x[0], x[1]);
      if (p.rank == 3) tma_load_3d(box(0), &p.in, mbarrier(0), x[0], x[1], x[2]);
      if (p.rank == 4) tma_load_4d(box(0), &p.in, mbarrier(0), x[0], x[1], x[2], x[3]);
      if (p.rank == 5) tma_load_5d(box(0), &p.in, mbarrier(0), x[0], x[1], x[2], x[3], x[4]);
    }
    mbarrier_wait(mbarrier(0), 0);
    for (int i = thread_index(); i < p.bytes / 4; i += 32) {
      st_global(p.out + i, static_cast<uint32_t>(ld_shared_int(box(0) + 4 * i)));
    }
  }
};

// c [64, N] += a [64, 64] b, where b is [N, 64] or, MN-major, [64, N]. a goes through shared memory, or its registers
// [4, 128, 4] come from global memory.
struct ProductParams {
  TensorMap a, b;
  const uint32_t* a_registers;
  const float* c_in;
  float* c;  // [128, N / 2]
};
template <class T, int N, bool A_IN_REGISTERS, bool MN_MAJOR_B>
struct ProductKernel {
  using Params = ProductParams;
  static constexpr int THREADS = 128, BLOCKS_PER_SM = 1;
  static constexpr uint32_t SHARED_BYTES = 49152;
  // Of b: panels of 64 columns if it is MN-major, else all N rows.
  static constexpr int PANELS = MN_MAJOR_B ? (N + 63) / 64 : 1, ROWS = MN_MAJOR_B ? 64 : N;

  FP_DEVICE void run(const Params& p) {
    const uint32_t a = shared_base(), b = a + 64 * 128, ready = b + PANELS * ROWS * 128;
    if (thread_index() == 0) {
      mbarrier_init(ready, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect_tx(ready, (A_IN_REGISTERS ? 0 : 64 * 128) + PANELS * ROWS * 128);
      if (!A_IN_REGISTERS) tma_load_2d(a, &p.a, ready, 0, 0);
      for (int i = 0; i < PANELS; i++) tma_load_2d(b + i * ROWS * 128, &p.b, ready, 64 * i, 0);
    }
    sync_block();
    float d[N / 2];
    uint32_t registers[4][4];
    for (int i = 0; i < N / 2; i++) d[i] = ld_global(p.c_in + thread_index() * (N / 2) + i);
    for (int i = 0; A_IN_REGISTERS && i < 16; i++) {
      registers[i / 4][i % 4] = ld_global(p.a_registers + (i / 4 * 128 + thread_index()) * 4 + i % 4);
    }
    mbarrier_wait(ready, 0);
    wgmma_fence();
    for (int k = 0; k < 4; k++) {
      // 16 elements of K are 32 bytes of a row, or 16 rows.
      const uint64_t of_b = matrix_descriptor(b + k * (MN_MAJOR_B ? 16 * 128 : 32), ROWS * 128, 1024);
      if constexpr (A_IN_REGISTERS)
        wgmma_rs<T, MN_MAJOR_B>(d, registers[k], of_b, true);
      else
        wgmma_ss<T, MN_MAJOR_B>(d, matrix_descriptor(a + 32 * k, 16, 1024), of_b, true);
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();
    pin(d);
    for (int i = 0; i < N / 2; i++) st_global(p.c + thread_index() * (N / 2) + i, d[i]);
  }
};

}  // namespace fastprefix

using namespace fastprefix;

extern "C" const char* run_case(const char* name, int broken, float* out, const void* in) {
  Params_ p{out, {}};
  if (const char* reason = encode_tensor_map(&p.in, {in, 2, {64, 64}, {1, 64}, {64, 64}, true})) return reason;
  for (const Named& each : cases) {
    if (std::strcmp(each.name, name) == 0) return (broken ? each.broken : each.correct)(p);
  }
  return "no such case";
}

extern "C" const char* load_box(const TensorBox* tensor, int bytes, const int* first, uint32_t* out) {
  BoxParams p{{}, out, tensor->rank, bytes, {}};
  for (int i = 0; i < tensor->rank; i++) p.first[i] = first[i];
  if (const char* reason = encode_tensor_map(&p.in, *tensor)) return reason;
  return launch<BoxKernel>(1, p, nullptr);
}

extern "C" const char* multiply(int half, int n, int mn_major, const void* a, const void* b, const uint32_t* registers,
                                const float* c_in, float* c) {
  ProductParams p{{}, {}, registers, c_in, c};
  const char* reason = nullptr;
  if (a) reason = encode_tensor_map(&p.a, {a, 2, {64, 64}, {1, 64}, {64, 64}, true});
  if (reason) return reason;
  const int rows = mn_major ? 64 : n, columns = mn_major ? n : 64;
  reason = encode_tensor_map(&p.b, {b, 2, {columns, rows}, {1, columns}, {64, rows}, true});
  if (reason) return reason;
  // The shapes of test_hopper.py.
  if (!half && a && n == 128 && !mn_major) return launch<ProductKernel<bf16_t, 128, false, false>>(1, p, nullptr);
  if (!half && !a && n == 192 && mn_major) return launch<ProductKernel<bf16_t, 192, true, true>>(1, p, nullptr);
  if (half && a && n == 32 && mn_major) return launch<ProductKernel<half_t, 32, false, true>>(1, p, nullptr);
  if (half && !a && n == 16 && !mn_major) return launch<ProductKernel<half_t, 16, true, false>>(1, p, nullptr);
  return "no such shape";
}
