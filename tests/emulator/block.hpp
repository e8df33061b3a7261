// A block: its shared memory, and where its threads wait for each other.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "scheduler.hpp"
#include "session.hpp"
#include "shadow.hpp"

namespace fastprefix::emulator {

// What a launch runs in each of its blocks.
struct Grid {
  int64_t blocks;
  int threads;
  uint32_t shared_bytes;
  void (*run)(const void* params);
  const void* params;
};

// What was issued and is done at the latest when its group is waited for.
struct AsyncGroups {
  using Work = std::function<void()>;

  std::vector<Work> open;  // In no group yet.
  std::deque<std::vector<Work>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void wait(size_t in_flight) {
    for (; committed.size() > in_flight; committed.pop_front()) {
      for (const Work& work : committed.front()) work();
    }
  }
  bool in_flight() const {
    bool any = !open.empty();
    for (const std::vector<Work>& group : committed) any |= !group.empty();
    return any;
  }
};

// Where the threads of a warp or warpgroup wait until all have come, each with an argument.
template <int SIZE>
struct Collective {
  const char* name = nullptr;
  int arrived = 0;
  void* arguments[SIZE];
};

struct Warp {
  uint32_t synced = 1;  // The tick of its clock at its last sync_warp or barrier.
  Clocks clocks;
  Collective<32> collective;
};

// Four warps, which execute wgmma together.
struct Warpgroup {
  Collective<128> collective;
  AsyncGroups wgmma;
  bool fenced = false;
  int registers = 0;  // Of a thread, by setmaxnreg.
};

// One of the 16 of bar.sync.
struct Barrier {
  int arrived = 0, expected = 0;
  Clocks clocks;
  std::vector<int> waiting;
};

struct MBarrier {
  MBarrier(int slot, int count, int made_by) : slot(slot), count(count), pending(count), made_by(made_by) {}

  int slot, count, pending, made_by;
  bool fenced = false;
  uint32_t phases = 0;       // Completed ones.
  int64_t bytes = 0;         // Expected and not yet come.
  Clocks clocks, completed;  // Of those who arrived, and of those before the last completion.
  std::vector<int> waiting;
};

class Block {
 public:
  static constexpr uint32_t SHARED_BASE = 1024;  // The address of the first byte; 0 is never one.

  explicit Block(const Grid& grid) : scheduler(grid.threads, entry), grid(grid) {}

  Scheduler scheduler;
  Shadow shadow;
  Counters counters;
  std::vector<AsyncGroups> cp_async;  // Of each thread.
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<uint32_t, MBarrier> mbarriers;  // By address.

  void run(int64_t index) {
    position = {index, -1};
    const int warp_count = grid.threads / 32;
    shared.assign(grid.shared_bytes, 0xFF);
    if (session.options.races) shadow.reset(grid.shared_bytes, warp_count);
    cp_async.assign(grid.threads, AsyncGroups());
    warps.assign(warp_count, Warp());
    for (int i = 0; i < warp_count; i++) warps[i].clocks.ticks[i] = 1;
    warpgroups.assign((warp_count + 3) / 4, Warpgroup());
    for (Barrier& barrier : barriers) barrier = Barrier();
    mbarriers.clear();
    if (scheduler.run()) {
      for (const Warpgroup& group : warpgroups) {
        if (group.wgmma.in_flight()) report("exit with wgmma in flight");
      }
    }
    counters.blocks++;
    position = {};
  }

  Warp& warp() { return warps[position.thread / 32]; }
  Warpgroup& warpgroup() { return warpgroups[position.thread / 128]; }
  static int lane() { return position.thread % 32; }

  // A collective of a warp or warpgroup: all of its threads wait, then the last one to arrive does the work of all.
  template <int SIZE = 32, class Work>
  void collective(const char* name, void* argument, Work work) {
    Collective<SIZE>* here;
    if constexpr (SIZE == 32)
      here = &warp().collective;
    else
      here = &warpgroup().collective;
    if (here->arrived == 0) here->name = name;
    if (std::strcmp(here->name, name) != 0) {
      report("divergent %s: %s meets %s", SIZE == 32 ? "warp" : "warpgroup", name, here->name);
      scheduler.abandon();
    }
    here->arguments[position.thread % SIZE] = argument;
    if (++here->arrived < SIZE) return scheduler.wait(name);
    here->arrived = 0;
    work(here->arguments);
    const int first = position.thread / SIZE * SIZE;
    for (int i = first; i < first + SIZE; i++) scheduler.wake(i);
  }

  void sync_warp() {
    collective("sync_warp", nullptr, [this](void**) { tick_and_sync(position.thread / 32); });
  }
  void sync_block() { arrive(0, grid.threads, true, "sync_block"); }

  // At a barrier where this many threads arrive. Those that wait go on when all have come.
  void arrive(int id, int expected, bool waits, const char* name) {
    Barrier& barrier = barriers[id];
    if (barrier.arrived == 0) barrier.expected = expected;
    if (barrier.expected != expected) {
      report("%s at barrier %d with %d threads, where another expects %d", name, id, expected, barrier.expected);
    }
    barrier.clocks.join(warp().clocks);
    if (waits)
      barrier.waiting.push_back(position.thread);
    else
      tick();
    if (++barrier.arrived < barrier.expected) {
      if (waits) scheduler.wait(name);
      return;
    }
    uint32_t released = 0;  // Warps, as bits.
    for (const int thread : barrier.waiting) {
      scheduler.wake(thread);
      released |= 1u << thread / 32;
    }
    for (; released; released &= released - 1) {
      const int warp = __builtin_ctz(released);
      warps[warp].clocks.join(barrier.clocks);
      tick_and_sync(warp);
    }
    barrier = Barrier();
  }

  // What a warp does after a tick is not covered by what others have seen of it before.
  void tick() { warp().clocks.ticks[position.thread / 32]++; }

  Actor actor() {
    const uint8_t index = static_cast<uint8_t>(position.thread / 32);
    const uint16_t fences = session.options.races ? shadow.fences[position.thread] : 0;
    const Clocks& clocks = warp().clocks;
    return {{index, static_cast<uint8_t>(lane()), fences, clocks.ticks[index]}, &clocks, warp().synced, false};
  }

  // Where an access to shared memory goes, or null and a report.
  uint8_t* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* name) {
    if (address < SHARED_BASE || address - SHARED_BASE + bytes > grid.shared_bytes) {
      report("%s of %u bytes outside shared memory: byte %lld of %u", name, bytes,
             static_cast<long long>(address) - SHARED_BASE, grid.shared_bytes);
      return nullptr;
    }
    if (address % alignment != 0) {
      report("%s of %u bytes is misaligned in shared memory: byte %u", name, bytes, address - SHARED_BASE);
      return nullptr;
    }
    return shared.data() + (address - SHARED_BASE);
  }

  // Accesses to shared memory as its shadow sees them. Whether a write is an asynchronous copy, which lands later.
  void trace_read(uint32_t address, uint32_t bytes, const Actor& me, const char* name) {
    if (session.options.races) shadow.read(address - SHARED_BASE, bytes, me, name);
  }
  void trace_write(uint32_t address, uint32_t bytes, const Actor& me, const char* name, bool in_flight = false) {
    if (session.options.races) shadow.write(address - SHARED_BASE, bytes, me, name, in_flight);
  }
  void trace_landing(uint32_t address, uint32_t bytes, const Access& me) {
    if (session.options.races) shadow.land(address - SHARED_BASE, bytes, me);
  }

  void load(uint32_t address, uint32_t bytes, void* to, const char* name, bool by_all_lanes = false) {
    const uint8_t* from = shared_at(address, bytes, bytes, name);
    std::memset(to, 0xFF, bytes);
    if (!from) return;
    Actor me = actor();
    if (by_all_lanes) me.lane = Access::ALL_LANES;
    trace_read(address, bytes, me, name);
    std::memcpy(to, from, bytes);
  }
  void store(uint32_t address, uint32_t bytes, const void* from, const char* name) {
    uint8_t* to = shared_at(address, bytes, bytes, name);
    if (!to) return;
    trace_write(address, bytes, actor(), name);
    std::memcpy(to, from, bytes);
  }

 private:
  // What each thread executes.
  static void entry();

  void tick_and_sync(int warp) { warps[warp].synced = ++warps[warp].clocks.ticks[warp]; }

  const Grid grid;
  std::vector<uint8_t> shared;
  Barrier barriers[16];
};

// The block of this OS thread.
constinit inline thread_local Block* block = nullptr;

inline void Block::entry() {
  block->grid.run(block->grid.params);
  if (block->cp_async[position.thread].in_flight()) report("exit with cp_async in flight");
  block->scheduler.exit();
}

}  // namespace fastprefix::emulator
