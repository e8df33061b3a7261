// A block: its threads, their shared memory, and where they wait for each other. One OS thread runs the whole block.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fiber.hpp"
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

// A cp.async that was issued. The rest of its 16 bytes after `bytes` becomes 0.
struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};

struct Thread {
  Fiber fiber;
  const char* waits_at = nullptr;
  bool exited = false;
  std::vector<Copy> open;                 // Issued and in no group yet.
  std::deque<std::vector<Copy>> groups;   // Committed and not waited for.
};

struct Warp {
  uint32_t ready = ~0u;               // Lanes that can run, as bits.
  const char* operation = nullptr;    // The collective at which lanes wait.
  int arrived = 0;
  void* arguments[32];
  Clocks clocks;
};

class Block {
 public:
  static constexpr uint32_t SHARED_BASE = 1024;  // The address of the first byte; 0 is never one.

  explicit Block(const Grid& grid)
      : grid(grid), stacks(grid.threads), threads(grid.threads), warps(grid.threads / 32) {}

  Counters counters;

  void run(int64_t index) {
    position = {index, -1};
    start();
    int turn = 0;
    while (running > 0 && !abandoned) {
      const int warp = choose(turn);
      if (warp < 0) {
        report_deadlock();
        break;
      }
      turn = warp + 1;
      position.thread = warp * 32 + __builtin_ctz(warps[warp].ready);
      counters.switches++;
      scheduler.switch_to(threads[position.thread].fiber);
    }
    counters.blocks++;
    position = {};
  }

  Warp& warp() { return warps[position.thread / 32]; }
  int lane() const { return position.thread % 32; }
  Thread& thread() { return threads[position.thread]; }

  // A collective of a warp: all lanes wait, then the last one to arrive does the work of all.
  template <class Work>
  void collective(const char* name, void* argument, Work work) {
    Warp& here = warp();
    if (here.arrived == 0) here.operation = name;
    if (std::strcmp(here.operation, name) != 0) {
      report("divergent warp: %s meets %s", name, here.operation);
      abandon();
    }
    here.arguments[lane()] = argument;
    if (++here.arrived < 32) return wait(name);
    here.arrived = 0;
    work(here.arguments);
    here.ready = ~0u;
  }

  void sync_warp() {
    collective("sync_warp", nullptr, [this](void**) { warp().clocks.ticks[position.thread / 32]++; });
  }

  void sync_block() {
    if (++arrived < grid.threads) return wait("sync_block");
    arrived = 0;
    Clocks all;
    for (const Warp& warp : warps) all.join(warp.clocks);
    for (size_t i = 0; i < warps.size(); i++) {
      warps[i].clocks = all;
      warps[i].clocks.ticks[i]++;
      warps[i].ready = ~0u;
    }
  }

  // Where an access to shared memory goes, or null and a report.
  uint8_t* shared_at(uint32_t address, uint32_t bytes, const char* name) {
    if (address < SHARED_BASE || address - SHARED_BASE + bytes > grid.shared_bytes) {
      report("%s of %u bytes outside shared memory: byte %lld of %u", name, bytes,
             static_cast<long long>(address) - SHARED_BASE, grid.shared_bytes);
      return nullptr;
    }
    if (address % bytes != 0) {
      report("%s of %u bytes is misaligned in shared memory: byte %u", name, bytes, address - SHARED_BASE);
      return nullptr;
    }
    return shared.data() + (address - SHARED_BASE);
  }

  void load(uint32_t address, uint32_t bytes, void* to, const char* name, bool by_all_lanes = false) {
    const uint8_t* from = shared_at(address, bytes, name);
    std::memset(to, 0xFF, bytes);
    if (!from) return;
    Actor me = actor();
    if (by_all_lanes) me.lane = Actor::ALL_LANES;
    if (session.options.races) shadow.read(address - SHARED_BASE, bytes, me, warp().clocks, name);
    std::memcpy(to, from, bytes);
  }

  void store(uint32_t address, uint32_t bytes, const void* from, const char* name) {
    uint8_t* to = shared_at(address, bytes, name);
    if (!to) return;
    if (session.options.races) shadow.write(address - SHARED_BASE, bytes, actor(), warp().clocks, name);
    std::memcpy(to, from, bytes);
  }

  // Until the copy lands its place holds NaN, unless it came at once. Nobody may look before the wait in either case.
  void issue(const Copy& copy) {
    uint8_t* to = shared_at(copy.to, 16, "cp_async");
    if (!to) return;
    counters.cp_async++;
    if (session.options.races) {
      shadow.write(copy.to - SHARED_BASE, 16, actor(), warp().clocks, "cp_async", true);
    }
    std::memset(to, 0xFF, 16);
    const Mode mode = session.options.mode;
    if (mode == EAGER || (mode == RANDOM && random() % 2)) move(copy);
    thread().open.push_back(copy);
  }

  void commit() {
    thread().groups.push_back(std::move(thread().open));
    thread().open.clear();
  }

  void wait_for_copies(size_t in_flight) {
    std::deque<std::vector<Copy>>& groups = thread().groups;
    for (; groups.size() > in_flight; groups.pop_front()) {
      for (const Copy& copy : groups.front()) {
        move(copy);
        if (session.options.races) shadow.land(copy.to - SHARED_BASE, 16, actor());
      }
    }
  }

  // What runs on a fiber.
  static void entry();

 private:
  void start() {
    std::seed_seq seeds{session.options.seed, session.launches, static_cast<uint64_t>(position.block)};
    random.seed(seeds);
    shared.assign(grid.shared_bytes, 0xFF);
    if (session.options.races) shadow.reset(grid.shared_bytes, static_cast<int>(warps.size()));
    for (size_t i = 0; i < warps.size(); i++) {
      warps[i] = Warp();
      warps[i].clocks.ticks[i] = 1;
    }
    for (int i = 0; i < grid.threads; i++) {
      threads[i].waits_at = nullptr;
      threads[i].exited = false;
      threads[i].open.clear();
      threads[i].groups.clear();
      stacks.start(threads[i].fiber, i, entry);
    }
    running = grid.threads;
    arrived = 0;
    abandoned = false;
  }

  // The first warp from `turn` on, or from a random one on, that has a lane which can run; -1 if there is none.
  int choose(int turn) {
    const int count = static_cast<int>(warps.size());
    if (session.options.seed != 0) turn = static_cast<int>(random() % count);
    for (int i = 0; i < count; i++) {
      const int warp = (turn + i) % count;
      if (warps[warp].ready) return warp;
    }
    return -1;
  }

  void wait(const char* name) {
    thread().waits_at = name;
    leave();
  }

  // To the next lane of the warp that can run, or else to the scheduler. Returns when this thread is chosen again.
  void leave() {
    Thread& self = thread();
    const int first = position.thread - lane();
    uint32_t& ready = warp().ready;
    ready &= ~(1u << lane());
    const uint32_t later = ready & (~1u << lane());
    counters.switches++;
    if (later) {
      position.thread = first + __builtin_ctz(later);
      self.fiber.switch_to(thread().fiber);
    } else {
      self.fiber.switch_to(scheduler);
    }
  }

  // Ends a block whose threads cannot go on in a way that means anything.
  void abandon() {
    abandoned = true;
    thread().fiber.switch_to(scheduler);
  }

  void report_deadlock() {
    struct Group {
      int count = 0, first = 0;
    };
    std::map<std::string, Group> groups;
    for (int i = 0; i < grid.threads; i++) {
      const Thread& thread = threads[i];
      Group& group = groups[thread.exited ? "have exited" : std::string("wait at ") + thread.waits_at];
      if (group.count++ == 0) group.first = i;
    }
    std::string text;
    for (const auto& [what, group] : groups) {
      text += (text.empty() ? "" : ", ") + std::to_string(group.count) + " threads " + what + " (the first is " +
              std::to_string(group.first) + ")";
    }
    position.thread = -1;
    report("deadlock: nobody can run; %s", text.c_str());
  }

  Actor actor() {
    const uint8_t index = static_cast<uint8_t>(position.thread / 32);
    return {index, static_cast<uint8_t>(lane()), warps[index].clocks.ticks[index]};
  }

  void move(const Copy& copy) {
    uint8_t* to = shared.data() + (copy.to - SHARED_BASE);
    std::memset(to, 0, 16);
    if (copy.bytes) std::memcpy(to, copy.from, copy.bytes);
  }

  const Grid grid;
  Stacks stacks;
  Fiber scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  Shadow shadow;
  std::mt19937 random;
  int running = 0;   // Threads that have not exited.
  int arrived = 0;   // At sync_block.
  bool abandoned = false;
};

// The block of this OS thread.
constinit inline thread_local Block* block = nullptr;

inline void Block::entry() {
  block->grid.run(block->grid.params);
  Thread& self = block->thread();
  bool in_flight = !self.open.empty();
  for (const std::vector<Copy>& group : self.groups) in_flight |= !group.empty();
  if (in_flight) report("exit with cp_async in flight");
  self.exited = true;
  block->running--;
  block->leave();
}

}  // namespace fastprefix::emulator
