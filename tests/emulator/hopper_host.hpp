// The functions of kernels/cuda/hopper_wrappers.cuh as a processor runs them. That file includes this one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block.hpp"
#include "global_memory.hpp"
#include "wrappers_host.hpp"

namespace fastprefix {

struct alignas(64) TensorMap {
  TensorBox tensor = {};
};

namespace emulator {

// ---- mbarriers

// The barrier at this address, which the running thread touches as it would a word; or null and a report.
inline MBarrier* find_mbarrier(uint32_t address, const char* name) {
  const auto found = block->mbarriers.find(address);
  if (found == block->mbarriers.end()) {
    report("%s at an address where no mbarrier was initialised", name);
    return nullptr;
  }
  block->trace_read(address, 8, block->actor(), name);
  return &found->second;
}

inline void settle(MBarrier& barrier) {
  if (barrier.pending < 0) report("more arrivals at an mbarrier than its count, %d", barrier.count);
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phases++;
  barrier.pending = barrier.count;
  barrier.completed = barrier.clocks;
  for (const int thread : barrier.waiting) block->scheduler.wake(thread);
  barrier.waiting.clear();
}

inline void arrive(uint32_t address, int bytes, const char* name) {
  MBarrier* barrier = find_mbarrier(address, name);
  if (!barrier) return;
  barrier->bytes += bytes;
  barrier->pending--;
  barrier->clocks.join(block->warp().clocks);
  block->tick();
  settle(*barrier);
}

// ---- the tensor memory accelerator

// One row of a box: the elements inside the tensor, and 0 in the place of the others.
inline void read_row(const TensorBox& tensor, const int* first, int row, uint16_t* elements) {
  std::fill_n(elements, tensor.box[0], uint16_t{0});
  const uint16_t* from = static_cast<const uint16_t*>(tensor.data);
  for (int d = 1; d < tensor.rank; d++) {
    const int64_t at = first[d] + row % tensor.box[d];
    if (at < 0 || at >= tensor.size[d]) return;
    from += at * tensor.stride[d];
    row /= tensor.box[d];
  }
  const int64_t begin = std::max(first[0], 0), end = std::min<int64_t>(first[0] + tensor.box[0], tensor.size[0]);
  if (begin >= end || !global_memory.read(from + begin, (end - begin) * 2, 2, "tma_load")) return;
  std::memcpy(elements + (begin - first[0]), from + begin, (end - begin) * 2);
}

template <int RANK>
void tma_load(uint32_t to, const TensorMap* map, uint32_t address, const int (&first)[RANK]) {
  const TensorBox tensor = map->tensor;
  if (tensor.rank != RANK) return report("tma_load_%dd with a map of rank %d", RANK, tensor.rank);
  MBarrier* barrier = find_mbarrier(address, "tma_load");
  if (!barrier) return;
  if (!barrier->fenced) report("tma_load on an mbarrier without fence_mbarrier_init");
  uint32_t rows = 1;
  for (int d = 1; d < RANK; d++) rows *= tensor.box[d];
  const uint32_t row_bytes = tensor.box[0] * 2, bytes = rows * row_bytes;
  uint8_t* place = block->shared_at(to, bytes, tensor.swizzle ? 1024 : 128, "tma_load");
  if (!place) return;
  block->counters.tma++;
  Actor me = block->actor();
  me.actor = static_cast<uint8_t>(MAX_WARPS + barrier->slot);
  me.tick = barrier->phases + 1;
  me.async_proxy = true;
  block->trace_write(to, bytes, me, "tma_load", true);
  std::memset(place, 0xFF, bytes);
  std::vector<int> corner(first, first + RANK);
  const Access access = me;
  block->scheduler.later([=] {
    uint16_t elements[256];
    for (uint32_t row = 0; row < rows; row++) {
      read_row(tensor, corner.data(), static_cast<int>(row), elements);
      for (uint32_t chunk = 0; chunk < row_bytes / 16; chunk++) {
        uint32_t byte = row * row_bytes + chunk * 16;
        if (tensor.swizzle) byte ^= (byte >> 7 & 7) << 4;
        std::memcpy(place + byte, elements + chunk * 8, 16);
      }
    }
    block->trace_landing(to, bytes, access);
    barrier->bytes -= bytes;
    uint32_t& seen = barrier->clocks.ticks[access.actor];
    seen = std::max(seen, access.tick);
    settle(*barrier);
  });
}

// ---- wgmma

// Calls visit(address, mn, k) for every 8 elements that lie together, from (mn, k) on, of an operand with 16 elements
// of K. Its rows of 128 bytes run along K, or else along M or N.
template <class Visit>
void visit_operand(uint64_t descriptor, bool mn_major, int mn_size, Visit visit) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  for (int i = 0; i < mn_size * 2; i++) {
    const int mn = mn_major ? i / 16 * 8 : i / 2, k = mn_major ? i % 16 : i % 2 * 8;
    uint32_t address = start;
    if (mn_major)
      address += mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128;
    else
      address += mn / 8 * stride + mn % 8 * 128 + k * 2;
    visit(address ^ (address >> 7 & 7) << 4, mn, k);
  }
}

// What a thread gives to a wgmma.
struct WgmmaThread {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

// d += a b for 64 rows and N columns. Accumulators hold NaN until they are waited for. Operands are read then too or,
// early, at the issue; in both cases they count as read until the wait.
template <class T, int N, bool A_IN_REGISTERS, bool MN_MAJOR_B>
class Wgmma {
 public:
  explicit Wgmma(void** arguments) : first_warp(position.thread / 128 * 4) {
    for (int i = 0; i < 128; i++) {
      threads[i] = *static_cast<WgmmaThread*>(arguments[i]);
      const WgmmaThread &mine = threads[i], &other = threads[0];
      if (mine.b_descriptor != other.b_descriptor || mine.accumulate != other.accumulate ||
          (!A_IN_REGISTERS && mine.a_descriptor != other.a_descriptor)) {
        report("wgmma with operands that differ between threads");
      }
      if (A_IN_REGISTERS) std::copy_n(mine.a, 4, a[i]);
      std::copy_n(mine.d, REGISTERS, d[i]);
      std::fill_n(mine.d, REGISTERS, bits_of<float>(POISON));
    }
    for (int i = 0; i < 4; i++) {
      clocks[i] = block->warps[first_warp + i].clocks;
      synced[i] = block->warps[first_warp + i].synced;
    }
    if (session.options.wgmma_mode == EAGER) multiply();
  }

  void finish() {
    trace_operands();
    for (int i = 0; i < 128; i++) {
      if (A_IN_REGISTERS && !std::equal(a[i], a[i] + 4, threads[i].a)) {
        report("a register operand was written while its wgmma was in flight");
      }
    }
    if (session.options.wgmma_mode != EAGER) multiply();
    for (int i = 0; i < 128 * REGISTERS; i++) accumulate(i / REGISTERS, i % REGISTERS);
  }

 private:
  static constexpr int REGISTERS = N / 2;
  static constexpr uint32_t POISON = 0x7fc0dead;

  // Register j of a thread is in the place of register j % 4 of an mma's c, 8 columns further for every 4.
  void accumulate(int thread, int j) {
    float& x = threads[thread].d[j];
    // What was poison at the issue already belongs to an earlier wgmma too, which has just set it.
    if (bits_of<uint32_t>(d[thread][j]) != POISON) {
      if (bits_of<uint32_t>(x) != POISON) report("an accumulator was written while its wgmma was in flight");
      x = d[thread][j];
    }
    const int row = thread / 32 * 16 + thread % 32 / 4 + j % 4 / 2 * 8, column = j / 4 * 8 + thread % 4 * 2 + j % 2;
    x = product[row][column] + (threads[0].accumulate ? x : 0.f);
  }

  // Reads by all four warps at the wait, with what they knew at the issue: no write may have come between. A warp has
  // waited for its own part, so that its lanes may write again; other warps may not.
  void trace_operands() {
    if (!session.options.races) return;
    const auto visit = [this](uint32_t address, int, int) {
      if (!block->shared_at(address, 16, 16, "wgmma")) return;
      for (int i = 0; i < 4; i++) {
        const uint8_t index = static_cast<uint8_t>(first_warp + i);
        const uint32_t tick = block->warps[index].clocks.ticks[index];
        const Actor warp{{index, Access::WAITED_FOR, 0, tick}, &clocks[i], synced[i], true};
        block->trace_read(address, 16, warp, "wgmma");
      }
    };
    visit_operand(threads[0].b_descriptor, MN_MAJOR_B, N, visit);
    if (!A_IN_REGISTERS) visit_operand(threads[0].a_descriptor, false, 64, visit);
  }

  // The element (mn, k) of an operand in shared memory goes to matrix[mn * mn_step + k * k_step].
  static void read_operand(uint64_t descriptor, bool mn_major, int mn_size, float* matrix, int mn_step, int k_step) {
    if (descriptor >> 62 != 1) report("wgmma with a descriptor that is not of 128-byte swizzle");
    visit_operand(descriptor, mn_major, mn_size, [=](uint32_t address, int mn, int k) {
      uint16_t x[8];
      const uint8_t* from = block->shared_at(address, 16, 16, "wgmma");
      if (!from) return;
      std::memcpy(x, from, 16);
      float* to = matrix + mn * mn_step + k * k_step;
      for (int i = 0; i < 8; i++) to[i * (mn_major ? mn_step : k_step)] = widen<T>(x[i]);
    });
  }

  void multiply() {
    float left[64][16], right[16][N];
    read_operand(threads[0].b_descriptor, MN_MAJOR_B, N, &right[0][0], 1, N);
    if (!A_IN_REGISTERS) read_operand(threads[0].a_descriptor, false, 64, &left[0][0], 16, 1);
    for (int i = 0; A_IN_REGISTERS && i < 128; i++) unpack_a<T>(threads[i].a, i % 32, left + i / 32 * 16);
    for (int m = 0; m < 64; m++) {
      std::fill_n(product[m], N, 0.f);
      for (int k = 0; k < 16; k++) {
        for (int n = 0; n < N; n++) product[m][n] += left[m][k] * right[k][n];
      }
    }
  }

  int first_warp;
  WgmmaThread threads[128];
  // At the issue: of the four warps, of a's registers, and of the accumulators.
  Clocks clocks[4];
  uint32_t synced[4];
  uint32_t a[128][4];
  float d[128][REGISTERS];
  float product[64][N];
};

template <class T, int N, bool A_IN_REGISTERS, bool MN_MAJOR_B>
void wgmma(WgmmaThread mine) {
  block->collective<128>("wgmma", &mine, [](void** arguments) {
    Warpgroup& group = block->warpgroup();
    if (!group.fenced) report("wgmma without wgmma_fence");
    block->counters.wgmma++;
    const auto work = std::make_shared<Wgmma<T, N, A_IN_REGISTERS, MN_MAJOR_B>>(arguments);
    group.wgmma.open.push_back([work] { work->finish(); });
  });
}

inline void set_registers(int registers, const char* name) {
  block->collective<128>(name, nullptr, [registers](void**) {
    block->warpgroup().registers = registers;
    int all = 0;
    for (const Warpgroup& group : block->warpgroups) all += 128 * group.registers;
    if (all > 65536) report("setmaxnreg: a block of %d registers, of which there are 65536", all);
  });
}

}  // namespace emulator

inline void mbarrier_init(uint32_t a, int count) {
  using namespace emulator;
  if (!block->shared_at(a, 8, 8, "mbarrier_init")) return;
  block->trace_write(a, 8, block->actor(), "mbarrier_init");
  const int slot = static_cast<int>(block->mbarriers.size());
  if (slot == MAX_MBARRIERS) return report("more than %d mbarriers", MAX_MBARRIERS);
  if (!block->mbarriers.insert({a, MBarrier(slot, count, position.thread)}).second) report("mbarrier_init, twice");
}
inline void fence_mbarrier_init() {
  for (auto& [address, barrier] : emulator::block->mbarriers) {
    if (barrier.made_by == emulator::position.thread) barrier.fenced = true;
  }
}
inline void mbarrier_arrive(uint32_t a) { emulator::arrive(a, 0, "mbarrier_arrive"); }
inline void mbarrier_arrive_expect_tx(uint32_t a, int bytes) {
  emulator::arrive(a, bytes, "mbarrier_arrive_expect_tx");
}
inline void mbarrier_wait(uint32_t a, int parity) {
  using namespace emulator;
  MBarrier* barrier = find_mbarrier(a, "mbarrier_wait");
  if (!barrier) return;
  if (parity != 0 && parity != 1) report("mbarrier_wait for parity %d", parity);
  while (static_cast<int>(barrier->phases & 1) == parity) {
    barrier->waiting.push_back(position.thread);
    block->scheduler.wait("mbarrier_wait");
  }
  block->warp().clocks.join(barrier->completed);
}

inline void tma_load_2d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1) {
  emulator::tma_load(to, map, mbarrier, {x0, x1});
}
inline void tma_load_3d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1, int x2) {
  emulator::tma_load(to, map, mbarrier, {x0, x1, x2});
}
inline void tma_load_4d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1, int x2, int x3) {
  emulator::tma_load(to, map, mbarrier, {x0, x1, x2, x3});
}
inline void tma_load_5d(uint32_t to, const TensorMap* map, uint32_t mbarrier, int x0, int x1, int x2, int x3, int x4) {
  emulator::tma_load(to, map, mbarrier, {x0, x1, x2, x3, x4});
}

inline void fence_proxy_async() {
  if (emulator::session.options.races) emulator::block->shadow.fences[emulator::position.thread]++;
}
inline void bar_sync(int id, int threads) { emulator::block->arrive(id, threads, true, "bar_sync"); }
inline void bar_arrive(int id, int threads) { emulator::block->arrive(id, threads, false, "bar_arrive"); }

template <int REGISTERS>
void setmaxnreg_inc() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  emulator::set_registers(REGISTERS, "setmaxnreg_inc");
}
template <int REGISTERS>
void setmaxnreg_dec() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  emulator::set_registers(REGISTERS, "setmaxnreg_dec");
}

inline void wgmma_fence() {
  emulator::block->collective<128>("wgmma_fence", nullptr, [](void**) { emulator::block->warpgroup().fenced = true; });
}
inline void wgmma_commit_group() {
  emulator::block->collective<128>("wgmma_commit_group", nullptr, [](void**) {
    emulator::block->warpgroup().wgmma.commit();
    emulator::block->warpgroup().fenced = false;
  });
}
template <int N>
void wgmma_wait_group() {
  emulator::block->collective<128>("wgmma_wait_group", nullptr, [](void**) {
    emulator::block->warpgroup().wgmma.wait(N);
  });
}
template <int N>
void pin(float (&)[N]) {}

template <class Type, bool MN_MAJOR_B, int REGISTERS>
void wgmma_ss(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma<Type, 2 * REGISTERS, false, MN_MAJOR_B>({d, nullptr, a, b, accumulate});
}
template <class Type, bool MN_MAJOR_B, int REGISTERS>
void wgmma_rs(float (&d)[REGISTERS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::wgmma<Type, 2 * REGISTERS, true, MN_MAJOR_B>({d, a, 0, b, accumulate});
}

}  // namespace fastprefix
