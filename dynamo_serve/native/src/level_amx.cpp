#pragma GCC target("avx2,fma,bmi2,prfchw,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8")
#define LEVEL 3
#define NAMESPACE amx
#include "level.inl"

namespace ds {
extern const Kernels amx_kernels = {"amx", amx::packed_bytes, amx::pack, amx::forward, amx::attend_queries, amx::linear};
}
