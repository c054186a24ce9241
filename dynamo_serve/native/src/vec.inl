// Vectors of WIDTH floats, and what all kernels do with them. No standard templates here or in the
// other .inl files: the linker would keep one instruction set's copy for all.

#if LEVEL >= 1
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef float vec_any __attribute__((vector_size(4 * WIDTH), may_alias, aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint16_t bf16;

#define METHOD inline __attribute__((always_inline))
#define INLINE static METHOD

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// An array that grows when asked for an entry beyond its end.
template <class T>
struct Buffer {
  T *data = nullptr;
  int64_t capacity = 0;

  METHOD T &at(int64_t i) {
    if (i >= capacity) {
      const int64_t wanted = 2 * i + 64;
      auto *larger = static_cast<T *>(allocate(wanted * sizeof(T)));
      if (data != nullptr) __builtin_memcpy(larger, data, capacity * sizeof(T));
      if (data != nullptr) release(data);
      data = larger;
      capacity = wanted;
    }
    return data[i];
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// Call `body` with a constant: `count`, or MOST if that is less.
template <int MOST, class Body>
INLINE void for_count(int64_t count, const Body &body) {
  if constexpr (MOST > 1)
    if (count < MOST) return for_count<MOST - 1>(count, body);
  body(Count<MOST>{});
}

INLINE vec splat(float x) { return x - vec{}; }
INLINE ivec first_integers() {
  ivec x{};
  for (int i = 0; i < WIDTH; i++) x[i] = i;
  return x;
}
INLINE ivec splat_int(int64_t x) { return static_cast<int32_t>(x) - ivec{}; }
INLINE vec load(const float *p) { return *reinterpret_cast<const vec_any *>(p); }
INLINE void store(float *p, vec x) { *reinterpret_cast<vec_any *>(p) = x; }
INLINE float widen(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }
INLINE bf16 narrow(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 64);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if LEVEL >= 1
INLINE vec load(const bf16 *p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE float sum(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(vec x) { return _mm512_reduce_max_ps(x); }
INLINE vec round_to_even(vec x) { return _mm512_roundscale_ps(x, 8); }
INLINE vec times_power_of_2(vec x, vec power) { return _mm512_scalef_ps(x, power); }
INLINE ivec to_int(vec x) { return (ivec)_mm512_cvtps_epi32(x); }
INLINE vec load(const int8_t *p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
INLINE void store_whole(int8_t *p, vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
#else
INLINE vec load(const bf16 *p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE float sum(vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float largest(vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE vec round_to_even(vec x) { return _mm256_round_ps(x, 8); }
INLINE ivec to_int(vec x) { return (ivec)_mm256_cvtps_epi32(x); }
INLINE vec times_power_of_2(vec x, vec power) {
  const vec bounded = _mm256_max_ps(_mm256_min_ps(power, splat(127)), splat(-127));
  return x * (vec)((to_int(bounded) + 127) << 23);  // 2 ** -127 becomes 0
}
INLINE vec load(const int8_t *p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
INLINE void store_whole(int8_t *p, vec x) {
  const ivec whole = to_int(x);
  for (int i = 0; i < WIDTH; i++) p[i] = static_cast<int8_t>(whole[i]);
}
#endif

#if LEVEL >= 2
INLINE void store(bf16 *p, vec x) {
  *reinterpret_cast<__m256i_u *>(p) = (__m256i)_mm512_cvtneps_pbh(x);
}
#elif LEVEL == 1
INLINE void store(bf16 *p, vec x) {
  const __m512i bits = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16),
                                                         _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(1 << 22));
  *reinterpret_cast<__m256i_u *>(p) = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
#else
INLINE void store(bf16 *p, vec x) {
  for (int i = 0; i < WIDTH; i++) p[i] = narrow(x[i]);
}
#endif

INLINE float get(const float *p) { return *p; }
INLINE float get(const bf16 *p) { return widen(*p); }
INLINE void put(float *p, float x) { *p = x; }
INLINE void put(bf16 *p, float x) { *p = narrow(x); }

template <class From, class To>
INLINE void copy(const From *from, To *to, int64_t n) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) store(to + i, load(from + i));
  for (; i < n; i++) put(to + i, get(from + i));
}

// 2 ** x: 2 ** n times a polynomial of degree 6 in the rest; relative error about 1e-7. Below 2 **
// -126 it is 0, so that masked scores vanish: denormal numbers take the processor a hundred times
// as long. A NaN stays one.
INLINE vec power_of_2(vec exponent) {
  // In this order, because the second one wins if either is NaN.
  const vec x = larger(splat(-126.0f), exponent);
  const vec n = round_to_even(x), r = x - n;
  vec p = splat(1.54035304e-4f);
  p = p * r + 1.33335581e-3f;
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  return exponent < -126.0f ? vec{} : times_power_of_2(p, n);
}

constexpr float LOG2_E = 1.44269504f;

INLINE vec exponential(vec x) { return power_of_2(x * LOG2_E); }
INLINE float exponential(float x) { return exponential(splat(x))[0]; }

INLINE vec hyperbolic_tangent(vec x) {
  const vec bounded = larger(splat(-15.0f), -larger(splat(-15.0f), -x));
  return 1.0f - 2.0f / (exponential(2.0f * bounded) + 1.0f);
}

INLINE vec activate(vec x, int32_t activation) {
  if (activation == SILU) return x / (1.0f + exponential(-x));
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.797884561f * (x + 0.044715f * x * x * x)));
}
