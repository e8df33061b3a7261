// The buffers that kernels may touch, and who touched each byte of those that they may write. Blocks of a launch run in
// any order, so no block may read or write what another one writes in the same launch.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "session.hpp"

namespace fastprefix::emulator {

// A launch, a block of it and a thread of that, in one number. 0 is none: launches count from 1. The stamp of an older
// launch says no more than that the byte was written, so nothing has to be reset between launches.
struct Stamp {
  static constexpr uint64_t SEVERAL = (1 << 10) - 1;  // In place of the thread of a reader: more than one block.

  uint64_t bits = 0;

  static Stamp here(uint64_t thread) {
    return {session.launches << 44 | static_cast<uint64_t>(position.block) << 10 | thread};
  }
  bool of_this_launch() const { return bits >> 44 == session.launches; }
  bool of_this_block() const { return bits >> 10 == here(0).bits >> 10; }
};

class GlobalMemory {
 public:
  void clear() { buffers.clear(); }

  void add(const char* name, const void* data, size_t bytes, bool writable) {
    const uintptr_t low = reinterpret_cast<uintptr_t>(data);
    Buffer buffer{name, low, low + bytes, nullptr};
    // calloc's pages cost nothing until they are touched.
    if (writable) buffer.traces.reset(static_cast<Trace*>(std::calloc(bytes + 1, sizeof(Trace))));
    buffers.push_back(std::move(buffer));
  }

  // Whether the access may be made; if not, the reason is reported.
  bool read(const void* data, size_t bytes, size_t alignment, const char* name) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    Buffer* buffer = find(address, bytes, alignment, false, name);
    for (size_t i = 0; buffer && buffer->traces && i < bytes; i++) {
      const size_t byte = address - buffer->low + i;
      Trace& trace = buffer->traces.get()[byte];
      Stamp reader{trace.reader.load()}, next;
      do {
        next = Stamp::here(reader.of_this_launch() && !reader.of_this_block() ? Stamp::SEVERAL : 0);
        if (reader.of_this_launch() && (reader.bits & Stamp::SEVERAL)) next = reader;
      } while (!trace.reader.compare_exchange_weak(reader.bits, next.bits));
      const Stamp writer{trace.writer.load()};
      if (writer.bits == 0) {
        report("%s reads %s + %zu that nothing wrote", name, buffer->name.c_str(), byte);
      } else if (writer.of_this_launch() && !writer.of_this_block()) {
        report("%s reads %s + %zu, which another block writes in the same launch", name, buffer->name.c_str(), byte);
      }
    }
    return buffer;
  }

  bool write(const void* data, size_t bytes, size_t alignment, const char* name) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    Buffer* buffer = find(address, bytes, alignment, true, name);
    for (size_t i = 0; buffer && i < bytes; i++) {
      const size_t byte = address - buffer->low + i;
      Trace& trace = buffer->traces.get()[byte];
      const Stamp mine = Stamp::here(position.thread), writer{trace.writer.exchange(mine.bits)};
      const Stamp reader{trace.reader.load()};
      if (writer.of_this_launch() && writer.bits != mine.bits) {
        const char* who = writer.of_this_block() ? "threads of a block" : "blocks";
        report("two %s write %s + %zu in the same launch", who, buffer->name.c_str(), byte);
      }
      if (reader.of_this_launch() && (!reader.of_this_block() || (reader.bits & Stamp::SEVERAL))) {
        report("%s writes %s + %zu, which another block reads in the same launch", name, buffer->name.c_str(), byte);
      }
    }
    return buffer;
  }

 private:
  // A reader leaves its stamp before it looks at the writer's, and a writer does the reverse. So on two OS threads at
  // least one of them sees the other.
  struct Trace {
    std::atomic<uint64_t> writer, reader;
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Buffer {
    std::string name;
    uintptr_t low, high;
    std::unique_ptr<Trace, Free> traces;  // One a byte if the buffer is writable, else null.
  };

  Buffer* find(uintptr_t address, size_t bytes, size_t alignment, bool write, const char* name) {
    if (address % alignment) {
      report("%s of %zu bytes is misaligned in global memory", name, bytes);
      return nullptr;
    }
    Buffer* nearest = nullptr;
    Buffer* read_only = nullptr;
    for (Buffer& buffer : buffers) {
      if (address >= buffer.low && address + bytes <= buffer.high) {
        if (!write || buffer.traces) return &buffer;
        read_only = &buffer;
      }
      if (address >= buffer.low && (!nearest || buffer.low > nearest->low)) nearest = &buffer;
    }
    if (read_only) {
      report("%s writes to %s, which is read-only", name, read_only->name.c_str());
    } else if (nearest) {
      report("%s of %zu bytes outside global memory: %s + %zu, which has %zu bytes", name, bytes, nearest->name.c_str(),
             address - nearest->low, nearest->high - nearest->low);
    } else {
      report("%s of %zu bytes outside global memory: before every buffer", name, bytes);
    }
    return nullptr;
  }

  std::vector<Buffer> buffers;
};
inline GlobalMemory global_memory;

}  // namespace fastprefix::emulator
