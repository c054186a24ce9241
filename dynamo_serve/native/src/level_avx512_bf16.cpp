#pragma GCC target("avx2,fma,bmi2,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#define LEVEL 2
#define NAMESPACE avx512_bf16
#include "level.inl"

namespace ds {
extern const Kernels avx512_bf16_kernels = {"avx512_bf16", avx512_bf16::packed_bytes, avx512_bf16::pack, avx512_bf16::forward, avx512_bf16::attend_queries, avx512_bf16::linear};
}
