// Who wrote and who read each word of a block's shared memory, and when. Of two accesses to a word, of which one is a
// write, a barrier must order them. Vector clocks tell whether one does, whatever the order of this run was.
#pragma once

#include <cstdint>
#include <vector>

#include "session.hpp"

namespace fastprefix::emulator {

constexpr int MAX_WARPS = 32, ACTORS = MAX_WARPS;

// The ticks of each actor's clock that another one has seen: what the actor did until then happened before.
struct Clocks {
  uint32_t ticks[ACTORS] = {};

  void join(const Clocks& other) {
    for (int i = 0; i < ACTORS; i++) ticks[i] = ticks[i] > other.ticks[i] ? ticks[i] : other.ticks[i];
  }
};

// Warps are actors, for lanes would cost 32 times the memory. A warp's clock ticks at each sync_warp and each barrier:
// two lanes' accesses within one tick are unordered. A shuffle, an mma or an ldmatrix orders no memory.
struct Actor {
  static constexpr uint8_t NOBODY = 255, ALL_LANES = 32;

  uint8_t index = NOBODY;
  uint8_t lane = ALL_LANES;
  uint32_t tick = 0;
};

class Shadow {
 public:
  void reset(uint32_t bytes, int warps) {
    warp_count = warps;
    words.assign(bytes / 4, Word());
    readers.resize(words.size() * warps);  // An entry counts only if its word says so.
  }

  void read(uint32_t byte, uint32_t bytes, Actor me, const Clocks& seen, const char* name) {
    for (uint32_t i = byte / 4; i < (byte + bytes) / 4; i++) {
      Word& word = words[i];
      if (word.in_flight) {
        report("%s reads shared word %u while an asynchronous copy to it is in flight", name, i);
      } else if (word.writer.index == Actor::NOBODY) {
        report("%s reads shared word %u that nothing wrote", name, i);
      } else if (unordered(word.writer, me, seen)) {
        report("race: %s reads shared word %u, written by %s", name, i, describe(word.writer, me));
      }
      Reader& reader = readers[i * warp_count + me.index];
      const bool again = (word.readers >> me.index & 1) && reader.tick == me.tick && reader.lane != me.lane;
      reader = {me.tick, again ? Actor::ALL_LANES : me.lane};
      word.readers |= 1u << me.index;
    }
  }

  // An asynchronous copy is in flight from its issue, which is the write, until it lands.
  void write(uint32_t byte, uint32_t bytes, Actor me, const Clocks& seen, const char* name, bool in_flight = false) {
    for (uint32_t i = byte / 4; i < (byte + bytes) / 4; i++) {
      Word& word = words[i];
      if (word.in_flight) {
        report("%s writes shared word %u while an asynchronous copy to it is in flight", name, i);
      } else if (word.writer.index != Actor::NOBODY && unordered(word.writer, me, seen)) {
        report("race: %s writes shared word %u, written by %s", name, i, describe(word.writer, me));
      }
      for (uint32_t left = word.readers; left; left &= left - 1) {
        const uint8_t warp = static_cast<uint8_t>(__builtin_ctz(left));
        const Reader& reader = readers[i * warp_count + warp];
        const Actor other{warp, static_cast<uint8_t>(reader.lane), reader.tick};
        if (unordered(other, me, seen)) {
          report("race: %s writes shared word %u, which may still be read by %s", name, i, describe(other, me));
        }
      }
      word = {me, 0, in_flight};
    }
  }

  void land(uint32_t byte, uint32_t bytes, Actor me) {
    for (uint32_t i = byte / 4; i < (byte + bytes) / 4; i++) words[i] = {me, 0, false};
  }

 private:
  struct Word {
    Actor writer;
    uint32_t readers = 0;  // Warps that read since the write, as bits.
    bool in_flight = false;
  };
  struct Reader {
    uint32_t tick : 26, lane : 6;
  };

  static bool unordered(Actor other, Actor me, const Clocks& seen) {
    if (other.index != me.index) return other.tick > seen.ticks[other.index];
    return other.tick == me.tick && (other.lane != me.lane || other.lane == Actor::ALL_LANES);
  }
  static const char* describe(Actor other, Actor me) {
    static thread_local char text[64];
    if (other.index == me.index) return "another lane of the warp without a sync_warp between";
    snprintf(text, sizeof text, "warp %d without a barrier between", other.index);
    return text;
  }

  int warp_count = 0;
  std::vector<Word> words;
  std::vector<Reader> readers;  // [words, warps]
};

}  // namespace fastprefix::emulator
