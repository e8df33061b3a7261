// What a test sets before a launch and reads after it. There is one session in a library.
#pragma once

#include <cctype>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace fastprefix::emulator {

// When an asynchronous copy arrives: as late as the kernel's waits allow, at once, or either by chance.
enum Mode : int { LATE = 0, EAGER = 1, RANDOM = 2 };

struct Options {
  Mode mode = LATE;
  Mode wgmma_mode = LATE;     // The same for wgmma, which is either late or early.
  uint64_t seed = 0;          // 0: blocks and warps take turns in order. Else they run in an order of chance.
  bool races = true;          // Whether every access is checked against those before it.
  int workers = 1;            // OS threads, each of which runs whole blocks.
  int multiprocessors = 132;  // What use_device() answers.
  int capability = 90;        // Of 90, is_hopper() says yes.
};

struct Counters {
  uint64_t mma = 0, ldmatrix = 0, bank_conflicts = 0, cp_async = 0, wgmma = 0, tma = 0, blocks = 0, switches = 0;

  void add(const Counters& other) {
    mma += other.mma;
    ldmatrix += other.ldmatrix;
    bank_conflicts += other.bank_conflicts;
    cp_async += other.cp_async;
    wgmma += other.wgmma;
    tma += other.tma;
    blocks += other.blocks;
    switches += other.switches;
  }
};

struct Session {
  static constexpr size_t MAX_ERRORS = 8;

  Options options;
  Counters counters;
  std::vector<std::string> errors;  // One of a kind.
  std::set<std::string> kinds;
  uint64_t launches = 0;
  std::string message;  // The first error of the last launch, or empty.
  std::mutex mutex;     // Of all but the options, while a grid runs.
};
inline Session session;

// The block and thread that runs on this OS thread; -1 stands for none.
struct Position {
  int64_t block = -1;
  int thread = -1;
};
constinit inline thread_local Position position;

// Adds an error. Two texts that differ in numbers alone are of one kind, and the first one stays.
__attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
  const std::lock_guard lock(session.mutex);
  if (!session.message.empty() && session.errors.size() >= Session::MAX_ERRORS) return;
  char text[300], line[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string kind;
  for (const char* c = text; *c; c++) {
    if (!std::isdigit(static_cast<unsigned char>(*c))) kind += *c;
  }
  snprintf(line, sizeof line, "launch %d, block %d, thread %d: %s", static_cast<int>(session.launches),
           static_cast<int>(position.block), position.thread, text);
  if (session.message.empty()) session.message = line;
  if (session.errors.size() < Session::MAX_ERRORS && session.kinds.insert(kind).second) session.errors.push_back(line);
}

}  // namespace fastprefix::emulator
