// Kernels that show what each function of wrappers.cuh computes.
#include "launch.cuh"

namespace fastprefix {

template <int THREADS_>
struct Kernel {
  static constexpr int THREADS = THREADS_, BLOCKS_PER_SM = 1;
  static constexpr uint32_t SHARED_BYTES = 8192;
};

// Registers of 32 lanes: a [32, 4] and b [32, 2], pairs of elements; c and out [32, 4], fp32. out = c + a b.
struct MmaParams {
  const uint32_t *a, *b;
  const float* c;
  float* out;
};
template <class T>
struct MmaKernel : Kernel<32> {
  using Params = MmaParams;
  FP_DEVICE void run(const Params& p) {
    const int lane = thread_index();
    uint32_t a[4], b[2];
    float c[4];
    for (int i = 0; i < 4; i++) a[i] = ld_global(p.a + lane * 4 + i);
    for (int i = 0; i < 2; i++) b[i] = ld_global(p.b + lane * 2 + i);
    for (int i = 0; i < 4; i++) c[i] = ld_global(p.c + lane * 4 + i);
    mma_m16n8k16<T>(c, a, b[0], b[1]);
    for (int i = 0; i < 4; i++) st_global(p.out + lane * 4 + i, c[i]);
  }
};

// Rows of 16 bytes in shared memory, and which of them each lane names: [32]. out: [32, 4] registers.
struct LdmatrixParams {
  const Float4* rows;
  int row_count;
  const int* named;
  uint32_t* out;
};
template <bool TRANS>
struct LdmatrixKernel : Kernel<32> {
  using Params = LdmatrixParams;
  FP_DEVICE void run(const Params& p) {
    const int lane = thread_index();
    for (int row = lane; row < p.row_count; row += 32) cp_async_16(shared_base() + row * 16, p.rows + row, 16);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    sync_warp();
    const uint32_t from = shared_base() + ld_global(p.named + lane) * 16;
    uint32_t r[4];
    if (TRANS)
      ldmatrix_x4_trans(r, from);
    else
      ldmatrix_x4(r, from);
    for (int i = 0; i < 4; i++) st_global(p.out + lane * 4 + i, r[i]);
  }
};

struct ShuffleParams {
  const float* x;      // [32]
  const int* integer;  // [32]
  float* xor_5;
  float* reversed;
  int* from_7;
  int* up_3;
};
struct ShuffleKernel : Kernel<32> {
  using Params = ShuffleParams;
  FP_DEVICE void run(const Params& p) {
    const int lane = thread_index();
    const float x = ld_global(p.x + lane);
    const int integer = ld_global(p.integer + lane);
    st_global(p.xor_5 + lane, shfl_xor(x, 5));
    st_global(p.reversed + lane, shfl_idx(x, 31 - lane));
    st_global(p.from_7 + lane, shfl_idx(integer, 7));
    st_global(p.up_3 + lane, shfl_up(integer, 3));
  }
};

// What a copy's place holds before the wait, and after it.
struct CopyParams {
  const float* in;
  float *before, *after;
};
struct CopyKernel : Kernel<64> {
  using Params = CopyParams;
  FP_DEVICE void run(const Params& p) {
    const int thread = thread_index();
    const uint32_t to = shared_base() + thread * 16;
    // The last thread's copy has no source.
    cp_async_16(to, p.in + thread * 4, thread < 63 ? 16 : 0);
    cp_async_commit_group();
    st_global(p.before + thread, ld_shared(to));
    cp_async_wait_group<0>();
    st_global(p.after + thread, ld_shared4(to).x[3]);
  }
};

struct TypesParams {
  float* out;
};
struct TypesKernel : Kernel<32> {
  using Params = TypesParams;
  FP_DEVICE void run(const Params& p) {
    const uint32_t mine = shared_base() + thread_index() * 16;
    st_shared(mine, Float2{{1.f, 2.f}});
    st_shared(mine + 8, 3.f);
    st_shared(mine + 12, 0x40800000);
    const Float4 all = ld_shared4(mine);
    const float sum = all.x[0] + all.x[1] + all.x[2] + all.x[3];
    const float first_bits = static_cast<float>(ld_shared_int(mine));
    st_global(reinterpret_cast<Float2*>(p.out) + thread_index(), Float2{{sum, first_bits}});
  }
};

// A number that nothing sets.
struct UnsetKernel : Kernel<32> {
  using Params = TypesParams;
  FP_DEVICE void run(const Params& p) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
    float x[4];
    st_global(p.out + thread_index(), x[thread_index() % 4]);
#pragma GCC diagnostic pop
  }
};

// Blocks and the warps of each, in the order in which they come: a host's variables, which a device would not have.
struct OrderParams {
  int* order;
  int* count;
};
struct OrderKernel : Kernel<128> {
  using Params = OrderParams;
  FP_DEVICE void run(const Params& p) {
    if (thread_index() % 32 == 0) p.order[(*p.count)++] = block_index() * 4 + thread_index() / 32;
    sync_block();
  }
};

template <class T>
void pack_all(const float* x, uint32_t* out, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i++) out[i] = pack<T>(x[2 * i], x[2 * i + 1]);
}
template <class T>
void widen_all(float* out) {
  for (int i = 0; i < 65536; i++) out[i] = emulator::widen<T>(static_cast<uint16_t>(i));
}

}  // namespace fastprefix

using namespace fastprefix;

#define EXPORT_LAUNCH(name, Kernel) \
  extern "C" const char* name(const Kernel::Params* p, int blocks) { return launch<Kernel>(blocks, *p, nullptr); }

EXPORT_LAUNCH(mma_bf16, MmaKernel<bf16_t>)
EXPORT_LAUNCH(mma_f16, MmaKernel<half_t>)
EXPORT_LAUNCH(ldmatrix, LdmatrixKernel<false>)
EXPORT_LAUNCH(ldmatrix_trans, LdmatrixKernel<true>)
EXPORT_LAUNCH(shuffles, ShuffleKernel)
EXPORT_LAUNCH(copies, CopyKernel)
EXPORT_LAUNCH(types, TypesKernel)
EXPORT_LAUNCH(unset, UnsetKernel)
EXPORT_LAUNCH(order, OrderKernel)

extern "C" void pack_bf16(const float* x, uint32_t* out, int64_t pairs) { pack_all<bf16_t>(x, out, pairs); }
extern "C" void pack_f16(const float* x, uint32_t* out, int64_t pairs) { pack_all<half_t>(x, out, pairs); }
extern "C" void widen_bf16(float* out) { widen_all<bf16_t>(out); }
extern "C" void widen_f16(float* out) { widen_all<half_t>(out); }
extern "C" float exp2_of(float x) { return ex2_approx(x); }
extern "C" float log2_of(float x) { return lg2_approx(x); }
extern "C" int multiprocessors_of_session() {
  const char* reason = "unset";
  const int count = use_device(0, &reason);
  return reason ? -1 : count;
}
