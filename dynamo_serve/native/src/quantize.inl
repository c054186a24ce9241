// Activations in 8 bits, symmetric, one scale per token, for products of whole numbers.

struct Quantized {
  const int8_t *whole;  // [tokens rounded up to 32][stride]
  int64_t stride;
  const float *factors;    // what one step of each token is worth
  const int32_t *offsets;  // -128 times each token's sum; only at level 2, whose weights are 128 more
};

// Round `n` values to int8, the largest to 127; returns what one step is worth (NaN if any is).
INLINE float quantize(const bf16 *x, int64_t n, int8_t *out, int32_t *offset) {
  vec most{}, zero{};
  for (int64_t i = 0; i < n; i += 16) {
    most = larger((vec)_mm512_abs_ps(load(x + i)), most);
    zero += load(x + i) * 0.0f;
  }
  const float worth = largest(most) / 127.0f + sum(zero), inverse = worth > 0 ? 1.0f / worth : 0.0f;
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(load(x + i) * inverse);
    const __m128i kept = _mm512_cvtsepi32_epi8(whole);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i), kept);
    if (LEVEL == 2) total = _mm512_add_epi32(total, _mm512_cvtepi8_epi32(kept));
  }
  if (LEVEL == 2) *offset = -128 * _mm512_reduce_add_epi32(total);
  return worth;
}

// Rows of `n` values, a multiple of 16; what is returned lasts until the caller's next product.
INLINE Quantized quantize_rows(const bf16 *x, int64_t n, int64_t stride, int64_t tokens) {
  const int64_t width = n + 64, rows = round_up(tokens, 32);
  auto *factors = static_cast<float *>(thread_scratch(QUANTIZED, rows * (width + 8)));
  auto *offsets = reinterpret_cast<int32_t *>(factors + rows);
  auto *whole = reinterpret_cast<int8_t *>(offsets + rows);
  parallel(divide_up(tokens, 4), [&](int64_t block) {
    for (int64_t i = block * 4; i < smaller(tokens, block * 4 + 4); i++)
      factors[i] = quantize(x + i * stride, n, whole + i * width, offsets + i);
  });
  return {whole, width, factors, offsets};
}
