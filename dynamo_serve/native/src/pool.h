// A few threads that take numbered tasks from a common counter.
#pragma once
#include <cstdint>

namespace ds {

// Start or change the number of threads, the caller's included. Not while tasks run.
void set_threads(int count);
int num_threads();

// While one of these lives, the thread that made it counts denormal numbers as 0; the pool's threads
// always do.
struct Normal {
  Normal();
  ~Normal();
  Normal(const Normal &) = delete;
  unsigned before = 0;
};

int64_t nanoseconds();  // of a clock that never goes back

using Task = void (*)(void *context, int64_t index);

// Run `task` for 0 .. count - 1, on the caller and on whichever threads are awake. The caller waits
// only for tasks that somebody took, never for a thread that has not got a core: with another
// process on its core, a thread is simply late for work.
void run_tasks(int64_t count, Task task, void *context);

template <class Body>
void parallel(int64_t count, const Body &body) {
  if (count == 1) return body(0);
  run_tasks(
      count, [](void *context, int64_t index) { (*static_cast<const Body *>(context))(index); },
      const_cast<Body *>(&body));
}

// Memory of at least `bytes` that stays with (thread, slot) until a larger one is asked for.
enum Scratch { SCORES, PACKED, SUMS, QUANTIZED, NUM_SCRATCH };
void *thread_scratch(Scratch slot, uint64_t bytes);

// Large memory on huge pages where the system gives them; contents undefined. Never null.
void *allocate(uint64_t bytes);
void release(void *memory);

}  // namespace ds
