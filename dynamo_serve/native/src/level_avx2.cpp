#pragma GCC target("avx2,fma,bmi2")
#define LEVEL 0
#define NAMESPACE avx2
#include "level.inl"

namespace ds {
extern const Kernels avx2_kernels = {"avx2", avx2::packed_bytes, avx2::pack, avx2::forward, avx2::attend_queries, avx2::linear};
}
