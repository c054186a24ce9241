// Linear layers by AVX-512 BF16 and VNNI: each lane multiplies a group of inputs, two of bfloat16 or
// four of int8, by the same token's. vpdpbusd wants one side without a sign: weights are packed 128
// larger, and sums begin at what this adds, which depends on the token alone.

constexpr int64_t GROUPS_ROWS = 8;

// Tokens as they go into groups: `stride` in bytes; factors and offsets as `Quantized` has them.
struct Rows {
  const char *x;
  int64_t stride;
  const float *factors;
  const int32_t *offsets;
};

struct Pairs {
  using Sums = vec;
  METHOD static Sums first(const Rows &, int64_t) { return Sums{}; }
  METHOD static Sums add(Sums sums, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)x);
  }
  METHOD static vec floats(Sums sums) { return sums; }
  METHOD static float factor(const Rows &, int64_t) { return 1.0f; }
};

struct Fours {
  using Sums = __m512i;
  METHOD static Sums first(const Rows &rows, int64_t token) {
    return _mm512_set1_epi32(rows.offsets[token]);
  }
  // gcc 12 copies sums to and fro around the intrinsic, which takes longer than the products.
  METHOD static Sums add(Sums sums, __m512i weights, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
    return sums;
  }
  METHOD static vec floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
  METHOD static float factor(const Rows &rows, int64_t token) { return rows.factors[token]; }
};

template <class Group, int ROWS, class To>
INLINE void group_block(const Linear &l, const char *w, const Rows &rows, int64_t token,
                        int64_t panel, int64_t ahead, const To &to) {
  typename Group::Sums sums[ROWS][2];
  for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = Group::first(rows, token + r);
  const char *x = rows.x + token * rows.stride, *end = x + l.inputs * size_of(l.type);
  for (; x < end; x += 4, w += 128) {
    fetch_ahead(w, 128, ahead);
    const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
    for (int r = 0; r < ROWS; r++) {
      int32_t group;
      __builtin_memcpy(&group, x + r * rows.stride, 4);
      const __m512i all = _mm512_set1_epi32(group);
      sums[r][0] = Group::add(sums[r][0], low, all);
      sums[r][1] = Group::add(sums[r][1], high, all);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    alignas(64) float y[PANEL];
    store(y, Group::floats(sums[r][0]));
    store(y + 16, Group::floats(sums[r][1]));
    to.take(l, token + r, panel, y, Group::factor(rows, token + r));
  }
}

template <class Group, class To>
INLINE void group_panels(const Linear &l, const Rows &rows, int64_t tokens, const To &to) {
  for_panels(l, panels_per_task(l), [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      const auto *w = static_cast<const char *>(l.weights) + panel * panel_bytes(l);
      for (int64_t token = 0; token < tokens; token += GROUPS_ROWS)
        for_count<GROUPS_ROWS>(tokens - token, [&](auto count) {
          group_block<Group, count.value>(l, w, rows, token, panel, token == 0 ? AHEAD : 0, to);
        });
    }
  });
}

template <class To>
INLINE void narrow_product(const Linear &l, const bf16 *x, int64_t stride, int64_t tokens,
                         const To &to) {
  if (l.type != INT8) {
    const Rows rows{reinterpret_cast<const char *>(x), stride * 2, nullptr, nullptr};
    return group_panels<Pairs>(l, rows, tokens, to);
  }
  const Quantized q = quantize_rows(x, l.inputs, stride, tokens);
  const Rows rows{reinterpret_cast<const char *>(q.whole), q.stride, q.factors, q.offsets};
  group_panels<Fours>(l, rows, tokens, to);
}
