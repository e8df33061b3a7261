// Who wrote and who read each word of a block's shared memory, and when. Of two accesses to a word, of which one is a
// write, a barrier must order them. Vector clocks tell whether one does, whatever the order of this run was.
#pragma once

#include <cstdint>
#include <vector>

#include "session.hpp"

namespace fastprefix::emulator {

// Warps are actors: with lanes as actors, clocks would have 32 times as many entries. Copies by the tensor memory
// accelerator are too, those of one mbarrier together.
constexpr int MAX_WARPS = 32, MAX_MBARRIERS = 32, ACTORS = MAX_WARPS + MAX_MBARRIERS;

// The ticks of each actor's clock that another one has seen: what the actor did until then happened before.
struct Clocks {
  uint32_t ticks[ACTORS] = {};

  void join(const Clocks& other) {
    for (int i = 0; i < ACTORS; i++) ticks[i] = ticks[i] > other.ticks[i] ? ticks[i] : other.ticks[i];
  }
};

struct Access {
  // In place of a lane: the whole warp; or the whole warp, which has waited until the access was done.
  static constexpr uint8_t NOBODY = 255, ALL_LANES = 32, WAITED_FOR = 33;

  uint8_t actor = NOBODY;
  uint8_t lane = ALL_LANES;
  uint16_t fences = 0;  // How often the thread had executed fence.proxy.async.
  uint32_t tick = 0;
};

// An access that is made now, with what its maker knows.
struct Actor : Access {
  const Clocks* seen = nullptr;
  uint32_t synced = 0;       // The warp's tick at its last sync_warp or barrier: since then its lanes are unordered.
  bool async_proxy = false;  // wgmma and bulk copies see ordinary stores only after a fence.
};

class Shadow {
 public:
  // How often each thread has executed fence.proxy.async.
  std::vector<uint16_t> fences;

  void reset(uint32_t bytes, int warps) {
    warp_count = warps;
    words.assign(bytes / 4, Word());
    readers.resize(words.size() * warps);  // An entry counts only if its word says so.
    fences.assign(warps * 32, 0);
  }

  void read(uint32_t byte, uint32_t bytes, const Actor& me, const char* name) {
    for (uint32_t i = byte / 4; i < (byte + bytes) / 4; i++) {
      Word& word = words[i];
      if (word.in_flight) {
        report("%s reads shared word %u while an asynchronous copy to it is in flight", name, i);
      } else if (word.writer.actor == Access::NOBODY) {
        report("%s reads shared word %u that nothing wrote", name, i);
      } else if (unordered(word.writer, me)) {
        report("race: %s reads shared word %u, written by %s", name, i, describe(word.writer, me));
      }
      if (unfenced(word.writer, me)) {
        report("%s reads shared word %u, written by ordinary stores without fence_proxy_async", name, i);
      }
      Reader& reader = readers[i * warp_count + me.actor];
      const bool by_another = (word.readers >> me.actor & 1) && reader.tick >= me.synced && reader.lane != me.lane;
      reader = {me.tick, by_another ? Access::ALL_LANES : me.lane};
      word.readers |= 1u << me.actor;
    }
  }

  // An asynchronous copy is in flight from its issue, which is the write, until it lands.
  void write(uint32_t byte, uint32_t bytes, const Actor& me, const char* name, bool in_flight = false) {
    for (uint32_t i = byte / 4; i < (byte + bytes) / 4; i++) {
      Word& word = words[i];
      if (word.in_flight) {
        report("%s writes shared word %u while an asynchronous copy to it is in flight", name, i);
      } else if (word.writer.actor != Access::NOBODY && unordered(word.writer, me)) {
        report("race: %s writes shared word %u, written by %s", name, i, describe(word.writer, me));
      }
      if (unfenced(word.writer, me)) {
        report("%s writes shared word %u, written by ordinary stores without fence_proxy_async", name, i);
      }
      for (uint32_t left = word.readers; left; left &= left - 1) {
        const uint8_t warp = static_cast<uint8_t>(__builtin_ctz(left));
        const Reader& reader = readers[i * warp_count + warp];
        const Access other{warp, static_cast<uint8_t>(reader.lane), 0, reader.tick};
        if (unordered(other, me)) {
          report("race: %s writes shared word %u, which may still be read by %s", name, i, describe(other, me));
        }
      }
      word = {me, 0, in_flight};
    }
  }

  void land(uint32_t byte, uint32_t bytes, const Access& me) {
    for (uint32_t i = byte / 4; i < (byte + bytes) / 4; i++) words[i] = {me, 0, false};
  }

 private:
  struct Word {
    Access writer;
    uint32_t readers = 0;  // Warps that read since the write, as bits.
    bool in_flight = false;
  };
  struct Reader {
    uint32_t tick : 26, lane : 6;
  };

  static bool unordered(const Access& other, const Actor& me) {
    if (other.actor != me.actor || me.actor >= MAX_WARPS) return other.tick > me.seen->ticks[other.actor];
    if (other.tick < me.synced || other.lane == Access::WAITED_FOR) return false;
    return other.lane != me.lane || other.lane == Access::ALL_LANES;
  }
  bool unfenced(const Access& other, const Actor& me) const {
    return me.async_proxy && other.actor < MAX_WARPS && fences[other.actor * 32 + other.lane] == other.fences;
  }
  static const char* describe(const Access& other, const Actor& me) {
    static thread_local char text[64];
    if (other.actor >= MAX_WARPS) return "a bulk copy without a wait for its mbarrier";
    if (other.actor == me.actor) return "another lane of the warp without a sync_warp between";
    snprintf(text, sizeof text, "warp %d without a barrier between", other.actor);
    return text;
  }

  int warp_count = 0;
  std::vector<Word> words;
  std::vector<Reader> readers;  // [words, warps]
};

}  // namespace fastprefix::emulator
