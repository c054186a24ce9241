#include "pool.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ds {
namespace {

// How long an idle thread looks for the next tasks before it sleeps. Between two operators of a
// forward there is less than this; while the scheduler plans, the core belongs to others.
constexpr int SPINS = 4000;

// Of the control word: results and operands too small for a normal number count as 0. Without it
// each of them costs a hundred cycles, and attention weights are full of them.
constexpr unsigned FLUSH_DENORMALS = 0x8040;

constexpr uint64_t HUGE_PAGE = 2u << 20;

struct Job {
  Task task;
  void *context;
  int64_t count;
};

// The part of a job that one thread begins with; the others help when they have done theirs. The
// job's number is in the upper half of `ticket` and the next index in the lower one, so that a
// thread that comes late can't take an index of a job that it has not read.
struct alignas(64) Share {
  std::atomic<uint64_t> ticket{0};
};

constexpr int MAX_THREADS = 1024;  // as many as engine.threads may be

struct Pool {
  Share shares[MAX_THREADS];
  alignas(64) std::atomic<int64_t> finished{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false};
  Job jobs[2];
  std::vector<std::thread> threads;
};

Pool *pool = nullptr;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void flush_denormals() {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | FLUSH_DENORMALS);
#endif
}

void wait_while(std::atomic<uint32_t> &word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT_PRIVATE, value, nullptr,
          nullptr, 0);
#else
  if (word.load() == value) std::this_thread::yield();
#endif
}

void wake_all(std::atomic<uint32_t> &word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr,
          nullptr, 0);
#endif
}

uint32_t first_of(int thread, int threads, int64_t count) {
  return static_cast<uint32_t>(count * thread / threads);
}

void take_from(Pool &p, Share &share, uint32_t generation, const Job &job, uint32_t end) {
  while (true) {
    uint64_t ticket = share.ticket.load(std::memory_order_acquire);
    const uint32_t index = static_cast<uint32_t>(ticket);
    if (static_cast<uint32_t>(ticket >> 32) != generation || index >= end) return;
    if (!share.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
    job.task(job.context, index);
    p.finished.fetch_add(1, std::memory_order_acq_rel);
  }
}

void work(Pool &p, uint32_t generation, int thread, int threads) {
  const Job job = p.jobs[generation & 1];
  for (int i = 0; i < threads; i++) {
    const int whose = (thread + i) % threads;
    take_from(p, p.shares[whose], generation, job, first_of(whose + 1, threads, job.count));
  }
}

void serve(Pool *p, int thread, int threads) {
  flush_denormals();
  uint32_t seen = 0;
  while (true) {
    uint32_t now = p->generation.load(std::memory_order_acquire);
    for (int spin = 0; now == seen && spin < SPINS; spin++) {
      pause();
      now = p->generation.load(std::memory_order_acquire);
    }
    if (now == seen) {
      p->sleeping.fetch_add(1);
      while ((now = p->generation.load()) == seen) wait_while(p->generation, seen);
      p->sleeping.fetch_sub(1);
    }
    if (p->stop.load()) return;
    seen = now;
    work(*p, now, thread, threads);
  }
}

// Not called at the end of the process: a kernel may still run in a thread that nobody waits for.
void stop_threads() {
  if (pool == nullptr) return;
  pool->stop = true;
  pool->generation.fetch_add(1);
  wake_all(pool->generation);
  for (auto &thread : pool->threads) thread.join();
  delete pool;
  pool = nullptr;
}

}  // namespace

void set_threads(int count) {
  count = count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : count;
  if (count == num_threads() && pool != nullptr) return;
  stop_threads();
  pool = new Pool;
  for (int i = 1; i < count; i++) pool->threads.emplace_back(serve, pool, i, count);
}

int num_threads() { return pool == nullptr ? 1 : static_cast<int>(pool->threads.size()) + 1; }

Normal::Normal() {
#if defined(__x86_64__)
  before = __builtin_ia32_stmxcsr();
#endif
  flush_denormals();
}

Normal::~Normal() {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(before);
#endif
}

void run_tasks(int64_t count, Task task, void *context) {
  if (count <= 0) return;
  if (count == 1 || num_threads() == 1) {
    for (int64_t i = 0; i < count; i++) task(context, i);
    return;
  }
  Pool &p = *pool;
  const uint32_t generation = p.generation.load() + 1;
  p.jobs[generation & 1] = Job{task, context, count};
  p.finished.store(0, std::memory_order_relaxed);
  const int threads = num_threads();
  for (int i = 0; i < threads; i++) {
    const uint64_t first = first_of(i, threads, count);
    p.shares[i].ticket.store(static_cast<uint64_t>(generation) << 32 | first);
  }
  p.generation.store(generation);
  if (p.sleeping.load() > 0) wake_all(p.generation);
  work(p, generation, 0, threads);
  while (p.finished.load(std::memory_order_acquire) < count) pause();
}

void *thread_scratch(Scratch slot, uint64_t bytes) {
  struct Block {
    void *memory = nullptr;
    uint64_t bytes = 0;
    ~Block() {
      if (memory != nullptr) release(memory);
    }
  };
  thread_local Block blocks[NUM_SCRATCH];
  Block &block = blocks[slot];
  if (block.bytes < bytes) {
    if (block.memory != nullptr) release(block.memory);
    block.memory = allocate(bytes);
    block.bytes = bytes;
  }
  return block.memory;
}

int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void *allocate(uint64_t bytes) {
  const uint64_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
  void *memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) {
    std::fprintf(stderr, "dynamo_serve: out of memory for %llu bytes\n",
                 static_cast<unsigned long long>(bytes));
    std::abort();
  }
#if defined(MADV_HUGEPAGE)
  if (bytes >= HUGE_PAGE) madvise(memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
  return memory;
}

void release(void *memory) { std::free(memory); }

}  // namespace ds
