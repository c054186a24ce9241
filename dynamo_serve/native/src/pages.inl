// How KV lies in pages. A head of a token is head_dim numbers of the type of the pages; as INT8 it is
// head_dim whole numbers, symmetric, and behind them a bfloat16 for each PAGE_BLOCK of these: what one
// step is worth. The same as dynamo_serve/engines/local/int8_pages.py.

constexpr int64_t PAGE_BLOCK = 32;

// Elements of `Page` that a head of a token takes.
template <class Page>
INLINE int64_t head_size(int64_t dim) {
  return sizeof(Page) == 1 ? dim + 2 * divide_up(dim, PAGE_BLOCK) : dim;
}

INLINE float worth_of(const int8_t *head, int64_t i, int64_t dim) {
  return widen(reinterpret_cast<const bf16 *>(head + dim)[i / PAGE_BLOCK]);
}

// WIDTH numbers of a head, or one, from the i-th on.
template <class Page>
INLINE vec read(const Page *head, int64_t i, int64_t) {
  return load(head + i);
}
INLINE vec read(const int8_t *head, int64_t i, int64_t dim) {
  return load(head + i) * worth_of(head, i, dim);
}
template <class Page>
INLINE float read_one(const Page *head, int64_t i, int64_t) {
  return get(head + i);
}
INLINE float read_one(const int8_t *head, int64_t i, int64_t dim) {
  return static_cast<float>(head[i]) * worth_of(head, i, dim);
}

#if LEVEL >= 2
// 32 numbers as bfloat16.
INLINE __m512i read_32(const bf16 *head, int64_t i, int64_t) { return _mm512_loadu_si512(head + i); }
INLINE __m512i read_32(const int8_t *head, int64_t i, int64_t dim) {
  const float worth = worth_of(head, i, dim);
  return (__m512i)_mm512_cvtne2ps_pbh(load(head + i + 16) * worth, load(head + i) * worth);
}
#endif

template <class T, class Page>
INLINE void write_head(const T *from, Page *head, int64_t dim) {
  copy(from, head, dim);
}

// What one step is worth where the largest number is `most`: rounded up, so that none is more than
// 127 steps; NaN for what is not finite, and 0 for what is next to nothing.
INLINE bf16 worth_for(float most) {
  const float worth = most / 127.0f;
  if (!(worth < 3.0e38f)) return 0x7fc0;
  if (worth < 1.0e-30f) return 0;
  return static_cast<bf16>((__builtin_bit_cast(uint32_t, worth) + 0xffffu) >> 16);
}

template <class T>
INLINE void write_head(const T *from, int8_t *head, int64_t dim) {
  auto *worths = reinterpret_cast<bf16 *>(head + dim);
  for (int64_t first = 0; first < dim; first += PAGE_BLOCK) {
    alignas(64) float numbers[PAGE_BLOCK] = {};
    copy(from + first, numbers, smaller(PAGE_BLOCK, dim - first));
    vec most{}, none{};
    for (int64_t i = 0; i < PAGE_BLOCK; i += WIDTH) {
      most = larger(larger(load(numbers + i), -load(numbers + i)), most);
      none += load(numbers + i) * 0.0f;  // NaN where a number is not finite
    }
    const bf16 worth = worth_for(largest(most) + sum(none));
    const float inverse = worth == 0 ? 0.0f : 1.0f / widen(worth);
    alignas(64) int8_t whole[PAGE_BLOCK];
    for (int64_t i = 0; i < PAGE_BLOCK; i += WIDTH)
      store_whole(whole + i, load(numbers + i) * inverse);
    __builtin_memcpy(head + first, whole, smaller(PAGE_BLOCK, dim - first));
    worths[first / PAGE_BLOCK] = worth;
  }
}
