// The C boundary: which kernels run here, and calls to them.
#include <cstring>
#include <mutex>

#include "kernels.h"
#include "pool.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using ds::Kernels;

// The thread pool and the activations belong to one call at a time, and to one within it.
std::recursive_mutex one_call;

#ifdef DS_TILES_ARE_EMULATED  // tests/native/tiles.h
bool has_amx() { return true; }
#else
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned a = 7, b, c = 0, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
  return (d & (BF16 | TILE | INT8)) == (BF16 | TILE | INT8) && may_use_tiles();
}
#endif

bool runs_here(const Kernels &k) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2"))
    return false;
  if (&k == &ds::avx2_kernels) return true;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return false;
  if (&k == &ds::avx512_kernels) return true;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return false;
  return &k == &ds::avx512_bf16_kernels || has_amx();
}

const Kernels *const ALL[] = {&ds::amx_kernels, &ds::avx512_bf16_kernels, &ds::avx512_kernels,
                              &ds::avx2_kernels};

}  // namespace

extern "C" {

// The i-th set of kernels, best first, or null where it does not run here (or there is none).
const Kernels *ds_kernels(int32_t i) {
  if (i < 0 || i >= 4 || !runs_here(*ALL[i])) return nullptr;
  return ALL[i];
}

const char *ds_kernels_name(int32_t i) { return i >= 0 && i < 4 ? ALL[i]->name : nullptr; }

void ds_set_threads(int32_t count) {
  const std::lock_guard<std::recursive_mutex> lock(one_call);
  ds::set_threads(count);
}

void *ds_allocate(uint64_t bytes) { return ds::allocate(bytes); }
void ds_release(void *memory) { ds::release(memory); }

uint64_t ds_packed_bytes(const Kernels *k, int32_t outputs, int32_t inputs, int32_t type) {
  return k->packed_bytes(outputs, inputs, type);
}

void ds_pack(const Kernels *k, void *packed, float *scales, const void *rows, int32_t row_type,
             int32_t outputs, int32_t inputs, int32_t type, int32_t gated) {
  const std::lock_guard<std::recursive_mutex> lock(one_call);
  k->pack(packed, scales, rows, row_type, outputs, inputs, type, gated);
}

void ds_forward(const Kernels *k, const ds::Model *model, const ds::Step *step) {
  const std::lock_guard<std::recursive_mutex> lock(one_call);
  const ds::Normal normal;
  k->forward(*model, *step);
}

void ds_attend(const Kernels *k, const ds::Attention *a, const ds::Step *step,
               const ds::Queries *queries) {
  const std::lock_guard<std::recursive_mutex> lock(one_call);
  const ds::Normal normal;
  k->attend(*a, *step, *queries);
}

void ds_linear(const Kernels *k, const ds::Linear *linear, const float *x, float *y,
               int32_t tokens) {
  const std::lock_guard<std::recursive_mutex> lock(one_call);
  const ds::Normal normal;
  k->linear(*linear, x, y, tokens);
}

// A hash of the sources that this was built from.
const char *ds_version() { return DS_VERSION; }

// Sizes of the structures, so that the other side of the boundary can compare.
int32_t ds_struct_size(int32_t which) {
  const size_t sizes[] = {sizeof(ds::Linear), sizeof(ds::Attention), sizeof(ds::Layer),
                          sizeof(ds::Model),  sizeof(ds::Step),      sizeof(ds::Queries),
                          sizeof(ds::Spent)};
  return which >= 0 && which < 7 ? static_cast<int32_t>(sizes[which]) : -1;
}

}  // extern "C"
