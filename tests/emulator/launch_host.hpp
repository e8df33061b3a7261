// launch(), use_device() and is_hopper() of kernels/cuda/launch.cuh, which includes this file, as a processor runs them. The
// session's C interface, for tests in Python, follows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "wrappers_host.hpp"

namespace fastprefix {

namespace emulator {

// What a device refuses.
inline bool can_launch(const Grid& grid) {
  if (grid.threads > 1024) report("more than 1024 threads a block: %d", grid.threads);
  if (grid.threads % 32 != 0) report("threads are no whole warps: %d", grid.threads);
  if (grid.shared_bytes > 232448) report("more than 232448 bytes of shared memory a block: %u", grid.shared_bytes);
  return session.message.empty();
}

// Every worker takes the next block until there is none.
inline const char* run_grid(const Grid& grid) {
  session.message.clear();
  session.launches++;
  std::vector<int64_t> order(grid.blocks);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(session.options.seed + session.launches);
  if (session.options.seed != 0) std::shuffle(order.begin(), order.end(), random);
  std::atomic<int64_t> next = 0;
  const auto work = [&grid, &order, &next] {
    Block here(grid);
    block = &here;
    for (int64_t i = next++; i < grid.blocks; i = next++) here.run(order[i]);
    block = nullptr;
    here.counters.switches = here.scheduler.switches;
    const std::lock_guard lock(session.mutex);
    session.counters.add(here.counters);
  };
  if (can_launch(grid)) {
    std::vector<std::thread> workers;
    for (int i = 1; i < session.options.workers; i++) workers.emplace_back(work);
    work();
    for (std::thread& worker : workers) worker.join();
  }
  return session.message.empty() ? nullptr : session.message.c_str();
}

}  // namespace emulator

// Null, or the first error. The text is there until the next launch.
template <class Kernel>
const char* launch(int64_t blocks, const typename Kernel::Params& params, void*) {
  static_assert(std::is_trivially_copyable_v<typename Kernel::Params>);
  if (blocks <= 0) return nullptr;
  const auto run = [](const void* params) { Kernel::run(*static_cast<const typename Kernel::Params*>(params)); };
  return emulator::run_grid({blocks, Kernel::THREADS, Kernel::SHARED_BYTES, run, &params});
}

inline int use_device(int, const char** reason) {
  *reason = nullptr;
  return emulator::session.options.multiprocessors;
}

inline bool is_hopper(int) { return emulator::session.options.capability == 90; }

}  // namespace fastprefix

#define FASTPREFIX_EXPORT extern "C" __attribute__((used)) inline

// A new session: no buffers, no errors, counters at 0.
FASTPREFIX_EXPORT void emulator_reset(int mode, int wgmma_mode, uint64_t seed, int races, int workers, int count, int capability) {
  using namespace fastprefix::emulator;
  session.options = {static_cast<Mode>(mode), static_cast<Mode>(wgmma_mode), seed, races != 0, workers, count, capability};
  session.counters = {};
  session.errors.clear();
  session.kinds.clear();
  session.launches = 0;
  global_memory.clear();
}
// A buffer that kernels may read, or read and write.
FASTPREFIX_EXPORT void emulator_add_buffer(const char* name, const void* data, size_t bytes, int writable) {
  fastprefix::emulator::global_memory.add(name, data, bytes, writable != 0);
}
// Error i, or null after the last.
FASTPREFIX_EXPORT const char* emulator_error(size_t i) {
  using fastprefix::emulator::session;
  return i < session.errors.size() ? session.errors[i].c_str() : nullptr;
}
FASTPREFIX_EXPORT void emulator_counters(fastprefix::emulator::Counters* counters) {
  *counters = fastprefix::emulator::session.counters;
}
