// The threads of a block take turns on one OS thread: each runs until it has to wait. Copies that arrive by themselves,
// as those of the tensor memory accelerator do, take turns with them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "session.hpp"

namespace fastprefix::emulator {

class Scheduler {
 public:
  using Work = std::function<void()>;

  // Every thread executes `entry`, which ends with exit().
  Scheduler(int threads, void (*entry)()) : entry(entry), stacks(threads), threads(threads), ready(threads / 32) {}

  std::mt19937 random;
  uint64_t switches = 0;

  // Whether all threads came to their end.
  bool run() {
    std::seed_seq seeds{session.options.seed, session.launches, static_cast<uint64_t>(position.block)};
    random.seed(seeds);
    for (size_t i = 0; i < threads.size(); i++) {
      threads[i].waits_at = nullptr;
      threads[i].exited = false;
      stacks.start(threads[i].fiber, static_cast<int>(i), entry);
    }
    ready.assign(ready.size(), ~0u);
    arrivals.clear();
    running = threads.size();
    abandoned = false;
    for (size_t turn = 0; running > 0 && !abandoned;) {
      while (session.options.mode == RANDOM && !arrivals.empty() && random() % 4 == 0) arrive();
      turn = choose(turn);
      if (turn < ready.size()) {
        resume(turn++);
      } else if (arrivals.empty()) {
        report_deadlock();
        abandoned = true;
      } else {
        arrive();
      }
    }
    position.thread = -1;
    if (!abandoned && !arrivals.empty()) report("exit with bulk copies in flight");
    return !abandoned;
  }

  // The running thread waits until another one wakes it.
  void wait(const char* name) {
    threads[position.thread].waits_at = name;
    leave();
  }
  void wake(int thread) { ready[thread / 32] |= 1u << thread % 32; }

  void exit() {
    threads[position.thread].exited = true;
    running--;
    leave();
  }

  // Ends the block, whose threads cannot go on in a way that means anything.
  void abandon() {
    abandoned = true;
    threads[position.thread].fiber.switch_to(scheduler);
  }

  // Something that happens at once, by chance, or only when no thread can run.
  void later(Work work) {
    arrivals.push_back(std::move(work));
    if (session.options.mode == EAGER) arrive();
  }

 private:
  struct Thread {
    Fiber fiber;
    const char* waits_at = nullptr;
    bool exited = false;
  };

  // The first warp from `turn` on, or from a random one on, that has a lane which can run.
  size_t choose(size_t turn) {
    const size_t warps = ready.size();
    if (session.options.seed != 0) turn = random() % warps;
    for (size_t i = 0; i < warps; i++) {
      const size_t warp = (turn + i) % warps;
      if (ready[warp]) return warp;
    }
    return warps;
  }

  void resume(size_t warp) {
    position.thread = static_cast<int>(warp) * 32 + __builtin_ctz(ready[warp]);
    switches++;
    scheduler.switch_to(threads[position.thread].fiber);
  }

  // To the next lane of the warp that can run, or else to the scheduler. Returns when this thread is chosen again.
  void leave() {
    const int self = position.thread, lane = self % 32;
    uint32_t& lanes = ready[self / 32];
    lanes &= ~(1u << lane);
    const uint32_t later = lanes & (~1u << lane);
    if (later) position.thread = self - lane + __builtin_ctz(later);
    switches++;
    threads[self].fiber.switch_to(later ? threads[position.thread].fiber : scheduler);
  }

  void arrive() {
    const int interrupted = position.thread;
    position.thread = -1;
    const size_t i = random() % arrivals.size();
    const Work work = std::move(arrivals[i]);
    arrivals.erase(arrivals.begin() + static_cast<std::ptrdiff_t>(i));
    work();
    position.thread = interrupted;
  }

  void report_deadlock() {
    struct Group {
      int count = 0, first = 0;
    };
    std::map<std::string, Group> groups;
    for (size_t i = 0; i < threads.size(); i++) {
      const std::string what = threads[i].exited ? "have exited" : std::string("wait at ") + threads[i].waits_at;
      Group& group = groups[what];
      if (group.count++ == 0) group.first = static_cast<int>(i);
    }
    std::string text;
    for (const auto& [what, group] : groups) {
      if (!text.empty()) text += ", ";
      text += std::to_string(group.count) + " threads " + what + " (the first is " + std::to_string(group.first) + ")";
    }
    position.thread = -1;
    report("deadlock: nobody can run; %s", text.c_str());
  }

  void (*entry)();
  Stacks stacks;
  Fiber scheduler;
  std::vector<Thread> threads;
  std::vector<uint32_t> ready;  // Of each warp, the lanes that can run, as bits.
  std::vector<Work> arrivals;   // What happens later.
  size_t running = 0;           // Threads that have not exited.
  bool abandoned = false;
};

}  // namespace fastprefix::emulator
