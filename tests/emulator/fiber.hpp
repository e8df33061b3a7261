// A CUDA thread is a fiber: it has a stack of its own and runs until it has to wait, then another one goes on.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(FASTPREFIX_UCONTEXT)
#define FASTPREFIX_UCONTEXT 0
#else
#undef FASTPREFIX_UCONTEXT
#define FASTPREFIX_UCONTEXT 1
#include <ucontext.h>
#endif

namespace fastprefix::emulator {

#if FASTPREFIX_UCONTEXT

// Any processor. Each switch makes a system call, so it is several times slower.
class Fiber {
 public:
  void start(uint8_t* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Fiber& other) { swapcontext(&context, &other.context); }

 private:
  ucontext_t context;
};

#else

// The registers that a function must preserve go to the old stack and come from the new one; ret then returns to where
// that stack was left.
extern "C" void fastprefix_switch_stack(void** save, void* load);
asm(R"(
.pushsection .text
.weak fastprefix_switch_stack
.hidden fastprefix_switch_stack
.type fastprefix_switch_stack, @function
fastprefix_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fastprefix_switch_stack, . - fastprefix_switch_stack
.popsection
)");

class Fiber {
 public:
  // Six registers, the address to return to, and a word that makes the stack aligned as after a call.
  void start(uint8_t* stack, size_t bytes, void (*entry)()) {
    uint64_t* top = reinterpret_cast<uint64_t*>(stack + bytes) - 8;
    for (int i = 0; i < 8; i++) top[i] = 0;
    top[6] = reinterpret_cast<uint64_t>(entry);
    stack_pointer = top;
  }
  // Suspends this fiber, which is the running one, and continues the other where it was suspended.
  void switch_to(Fiber& other) { fastprefix_switch_stack(&stack_pointer, other.stack_pointer); }

 private:
  void* stack_pointer = nullptr;
};

#endif

// Stacks for the threads of a block. A page that nobody touches costs nothing, and the lowest page of each stack cannot
// be touched, so that an overflow ends the process instead of changing another thread's variables.
class Stacks {
 public:
  static constexpr size_t BYTES = 256 << 10;

  explicit Stacks(int count) : count(count) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory = static_cast<uint8_t*>(mmap(nullptr, count * BYTES, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < count; i++) mprotect(memory + i * BYTES, page(), PROT_NONE);
  }
  ~Stacks() { munmap(memory, count * BYTES); }
  Stacks(const Stacks&) = delete;

  void start(Fiber& fiber, int i, void (*entry)()) {
    fiber.start(memory + i * BYTES + page(), BYTES - page(), entry);
  }

 private:
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  int count;
  uint8_t* memory;
};

}  // namespace fastprefix::emulator
