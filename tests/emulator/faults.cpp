// One kernel for each fault that the emulator names: with the fault, and without it.
#include <cstring>

#include "launch.cuh"

namespace fastprefix {

// `in` and `out` have 256 numbers each.
struct Buffers {
  float* out;
  const float* in;
};

template <int THREADS_, int BLOCKS_ = 1>
struct Case {
  using Params = Buffers;
  static constexpr int THREADS = THREADS_, BLOCKS_PER_SM = 1, BLOCKS = BLOCKS_;
  static constexpr uint32_t SHARED_BYTES = 4096;
};

FP_DEVICE uint32_t word(int i) { return shared_base() + 4 * i; }
FP_DEVICE void copy_and_commit(const Buffers& p, int i) {
  cp_async_16(word(4 * i), p.in + 4 * i, 16);
  cp_async_commit_group();
}

// ---- asynchronous copies

template <bool BROKEN>
struct no_wait : Case<64> {
  FP_DEVICE void run(const Buffers& p) {
    copy_and_commit(p, thread_index());
    if (!BROKEN) cp_async_wait_group<0>();
    sync_block();
    st_global(p.out + thread_index(), ld_shared(word(thread_index())));
    cp_async_wait_group<0>();
  }
};
template <bool BROKEN>
struct wait_for_too_few : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    copy_and_commit(p, thread_index());
    copy_and_commit(p, 32 + thread_index());
    cp_async_wait_group<BROKEN ? 2 : 1>();
    st_global(p.out + thread_index(), ld_shared(word(4 * thread_index())));
    cp_async_wait_group<0>();
  }
};
template <bool BROKEN>
struct exit_in_flight : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    copy_and_commit(p, thread_index());
    if (!BROKEN) cp_async_wait_group<0>();
  }
};
template <bool BROKEN>
struct overwritten_in_flight : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    copy_and_commit(p, thread_index());
    if (!BROKEN) cp_async_wait_group<0>();
    st_shared(word(4 * thread_index()), 1.f);
    cp_async_wait_group<0>();
  }
};
template <bool BROKEN>
struct copy_of_8_bytes : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    cp_async_16(word(4 * thread_index()), p.in, BROKEN ? 8 : 16);
    cp_async_commit_group();
    cp_async_wait_group<0>();
  }
};

// ---- races in shared memory

template <bool BROKEN>
struct no_barrier_before_reading : Case<64> {
  FP_DEVICE void run(const Buffers& p) {
    copy_and_commit(p, thread_index());
    cp_async_wait_group<0>();
    if (!BROKEN) sync_block();
    st_global(p.out + thread_index(), ld_shared(word(4 * (63 - thread_index()))));
  }
};
template <bool BROKEN>
struct no_barrier_before_writing : Case<64> {
  FP_DEVICE void run(const Buffers& p) {
    const int t = thread_index();
    st_shared(word(t), static_cast<float>(t));
    sync_block();
    const float x = ld_shared(word(63 - t));
    if (!BROKEN) sync_block();
    st_shared(word(t), x);
    st_global(p.out + t, x);
  }
};
template <bool BROKEN>
struct two_warps_write : Case<64> {
  FP_DEVICE void run(const Buffers&) { st_shared(word(thread_index() % (BROKEN ? 32 : 64)), 1.f); }
};
template <bool BROKEN>
struct two_lanes_write : Case<32> {
  FP_DEVICE void run(const Buffers&) { st_shared(word(thread_index() % (BROKEN ? 16 : 32)), 1.f); }
};
template <bool BROKEN>
struct lane_reads_without_sync : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    const int t = thread_index();
    st_shared(word(t), static_cast<float>(t));
    if (!BROKEN) sync_warp();
    st_global(p.out + t, ld_shared(word(t ^ 1)));
  }
};
template <bool BROKEN>
struct lane_writes_without_sync : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    const int t = thread_index();
    st_shared(word(t), static_cast<float>(t));
    sync_warp();
    const float x = ld_shared(word(t ^ 1));
    if (!BROKEN) sync_warp();
    st_shared(word(t), x);
    st_global(p.out + t, x);
  }
};
template <bool BROKEN>
struct ldmatrix_without_sync : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    const int t = thread_index();
    for (int i = 0; i < 4; i++) st_shared(word(4 * t + i), t);
    // A shuffle makes lanes wait, but it does not order their memory.
    float x = shfl_xor(1.f, 1);
    if (!BROKEN) sync_warp();
    uint32_t r[4];
    ldmatrix_x4(r, word(4 * t));
    st_global(p.out + t, x + static_cast<float>(r[0]));
  }
};
template <bool BROKEN>
struct never_written : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    st_shared(word(thread_index()), 1.f);
    st_global(p.out + thread_index(), ld_shared(word(thread_index() + (BROKEN ? 32 : 0))));
  }
};

// ---- threads that do not meet

template <bool BROKEN>
struct half_a_warp : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    if (BROKEN && thread_index() >= 16) return;
    st_global(p.out + thread_index(), shfl_xor(1.f, 1));
  }
};
template <bool BROKEN>
struct divergent : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    float x = 1.f;
    if (BROKEN && thread_index() >= 16)
      sync_warp();
    else
      x = shfl_xor(x, 1);
    st_global(p.out + thread_index(), x);
  }
};
template <bool BROKEN>
struct exit_before_barrier : Case<64> {
  FP_DEVICE void run(const Buffers&) {
    if (BROKEN && thread_index() >= 40) return;
    sync_block();
  }
};
template <bool BROKEN>
struct barrier_in_half_a_warp : Case<32> {
  FP_DEVICE void run(const Buffers&) {
    if (!BROKEN || thread_index() < 16) sync_block();
    sync_warp();
    if (BROKEN && thread_index() >= 16) sync_block();
  }
};

// ---- global memory

template <bool BROKEN>
struct read_past_end : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    st_global(p.out + thread_index(), ld_global(p.in + 256 - 32 + thread_index() + (BROKEN ? 1 : 0)));
  }
};
template <bool BROKEN>
struct write_past_end : Case<32> {
  FP_DEVICE void run(const Buffers& p) { st_global(p.out + 256 - 32 + thread_index() + (BROKEN ? 1 : 0), 1.f); }
};
template <bool BROKEN>
struct copy_past_end : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    // A copy of no bytes may name any source.
    cp_async_16(word(4 * thread_index()), p.in + 256, BROKEN ? 16 : 0);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    st_global(p.out + thread_index(), ld_shared(word(4 * thread_index())));
  }
};
template <bool BROKEN>
struct write_to_read_only : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    st_global((BROKEN ? const_cast<float*>(p.in) : p.out) + thread_index(), 1.f);
  }
};
template <bool BROKEN>
struct misaligned_global : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    const Float4* from = reinterpret_cast<const Float4*>(p.in + (BROKEN ? 1 : 4));
    st_global(p.out + thread_index(), ld_global(from).x[0]);
  }
};
template <bool BROKEN>
struct two_blocks_write : Case<32, 4> {
  FP_DEVICE void run(const Buffers& p) {
    st_global(p.out + (BROKEN ? block_index() / 2 : block_index()) * 32 + thread_index(), 1.f);
  }
};
template <bool BROKEN>
struct two_threads_write : Case<64> {
  FP_DEVICE void run(const Buffers& p) { st_global(p.out + thread_index() / (BROKEN ? 2 : 1), 1.f); }
};
template <bool BROKEN>
struct block_reads_another : Case<32, 4> {
  FP_DEVICE void run(const Buffers& p) {
    float* mine = p.out + block_index() * 32 + thread_index();
    float* next = p.out + (block_index() + 1) % 4 * 32 + thread_index();
    st_global(mine, 1.f);
    ld_global(BROKEN ? next : mine);
  }
};
template <bool BROKEN>
struct output_never_written : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    if (!BROKEN) st_global(p.out + thread_index(), 1.f);
    ld_global(p.out + thread_index());
  }
};

// ---- addresses and sizes

template <bool BROKEN>
struct misaligned_ldmatrix : Case<32> {
  FP_DEVICE void run(const Buffers& p) {
    for (int i = 0; i < 8; i++) st_shared(word(8 * thread_index() + i), 0);
    sync_warp();
    uint32_t r[4];
    ldmatrix_x4(r, word(4 * thread_index()) + (BROKEN ? 8 : 0));
    st_global(p.out + thread_index(), static_cast<float>(r[0]));
  }
};
template <bool BROKEN>
struct outside_shared : Case<32> {
  FP_DEVICE void run(const Buffers&) { st_shared(word(1024 - 32 + thread_index() + (BROKEN ? 1 : 0)), 1.f); }
};
template <bool BROKEN>
struct too_much_shared : Case<32> {
  static constexpr uint32_t SHARED_BYTES = BROKEN ? 232449 : 232448;
  FP_DEVICE void run(const Buffers&) {}
};
template <bool BROKEN>
struct too_many_threads : Case<BROKEN ? 1056 : 1024> {
  FP_DEVICE void run(const Buffers&) {}
};
template <bool BROKEN>
struct no_whole_warps : Case<BROKEN ? 48 : 64> {
  FP_DEVICE void run(const Buffers&) {}
};

using Launch = const char* (*)(const Buffers&);
template <class Kernel>
const char* launch_case(const Buffers& p) {
  return launch<Kernel>(Kernel::BLOCKS, p, nullptr);
}

struct Named {
  const char* name;
  Launch correct, broken;
};
#define CASE(name) \
  { #name, launch_case<name<false>>, launch_case<name<true>> }
static const Named cases[] = {
    CASE(no_wait),
    CASE(wait_for_too_few),
    CASE(exit_in_flight),
    CASE(overwritten_in_flight),
    CASE(copy_of_8_bytes),
    CASE(no_barrier_before_reading),
    CASE(no_barrier_before_writing),
    CASE(two_warps_write),
    CASE(two_lanes_write),
    CASE(lane_reads_without_sync),
    CASE(lane_writes_without_sync),
    CASE(ldmatrix_without_sync),
    CASE(never_written),
    CASE(half_a_warp),
    CASE(divergent),
    CASE(exit_before_barrier),
    CASE(barrier_in_half_a_warp),
    CASE(read_past_end),
    CASE(write_past_end),
    CASE(copy_past_end),
    CASE(write_to_read_only),
    CASE(misaligned_global),
    CASE(two_blocks_write),
    CASE(two_threads_write),
    CASE(block_reads_another),
    CASE(output_never_written),
    CASE(misaligned_ldmatrix),
    CASE(outside_shared),
    CASE(too_much_shared),
    CASE(too_many_threads),
    CASE(no_whole_warps),
};

}  // namespace fastprefix

extern "C" const char* run_case(const char* name, int broken, float* out, const float* in) {
  for (const fastprefix::Named& each : fastprefix::cases) {
    if (std::strcmp(each.name, name) == 0) return (broken ? each.broken : each.correct)({out, in});
  }
  return "no such case";
}
