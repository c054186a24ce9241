#pragma GCC target("avx2,fma,bmi2,prfchw,avx512f,avx512bw,avx512dq,avx512vl")
#define LEVEL 1
#define NAMESPACE avx512
#include "level.inl"

namespace ds {
extern const Kernels avx512_kernels = {"avx512", avx512::packed_bytes, avx512::pack, avx512::forward, avx512::attend_queries, avx512::linear};
}
