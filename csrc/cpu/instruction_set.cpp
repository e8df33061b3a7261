// Which kernels this processor runs, and the memory that they work in.
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastprefix {
namespace {

#if defined(__x86_64__)
// torch's own variable, which takes its kernels down to AVX2 or plain ones as well.
bool allows(const char* name) {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (!wanted) return true;
  if (std::strcmp(wanted, "default") == 0) return false;
  return std::strcmp(wanted, "avx2") != 0 || std::strcmp(name, "avx2") == 0;
}

// By its bit: not every compiler's __builtin_cpu_supports knows the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Kernels& find() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && allows("avx512")) return avx512::kernels;
  if (avx2 && allows("avx2")) return avx2::kernels;
#endif
  return baseline::kernels;
}

struct Memory {
  float* data = nullptr;
  int64_t size = 0;

  ~Memory() { std::free(data); }

  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }

  float* of(int64_t floats) {
    if (size < floats) {
      std::free(data);
      size = (floats + 15) / 16 * 16;
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
      if (!data) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
};

// Bytes of what tasks leave each other that a thread keeps for its next call.
constexpr size_t MOST_KEPT = size_t{1} << 24;
thread_local Memory left;

}  // namespace

const Kernels& kernels() {
  static const Kernels& found = find();
  return found;
}

const char* instruction_set() { return kernels().name; }

float* scratch(int64_t floats) {
  thread_local Memory memory;
  return memory.of(floats);
}

float* workspace(int64_t floats) { return left.of(floats); }

void release_workspace() {
  if (left.size * sizeof(float) > MOST_KEPT) left.release();
}

}  // namespace fastprefix
