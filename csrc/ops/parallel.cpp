// Tasks on torch's threads.
#include <ATen/Parallel.h>

#include <atomic>

#include "cpu/call.h"

namespace fastprefix {

void run_tasks(int64_t count, bool serial, Task task, const void* context) {
  const int64_t threads = serial ? 1 : std::min<int64_t>(at::get_num_threads(), count);
  if (threads <= 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < count; i++) task(context, i);
    return;
  }
  // Tasks differ in size: each thread takes the next when it has none. What a task writes does not depend on the thread.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; thread++)
      for (int64_t i = next++; i < count; i = next++) task(context, i);
  });
}

}  // namespace fastprefix
