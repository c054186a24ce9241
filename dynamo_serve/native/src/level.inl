// One instruction set: LEVEL and NAMESPACE are set by the file that includes this one.
#include <immintrin.h>

#include "kernels.h"
#include "pool.h"

namespace ds {
namespace NAMESPACE {
#include "vec.inl"
#include "product.inl"
#if LEVEL >= 2
#include "quantize.inl"
#if LEVEL >= 3
#include "product_amx.inl"
#else
#include "product_groups.inl"
#endif
#endif
#include "pack.inl"
#include "pages.inl"
#include "elementwise.inl"
#include "attention.inl"
#include "attention_few.inl"
#if LEVEL >= 2
#include "attention_many.inl"
#endif
#include "attention_run.inl"
#include "forward.inl"
}  // namespace NAMESPACE
}  // namespace ds
