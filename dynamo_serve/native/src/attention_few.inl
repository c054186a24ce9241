// Few queries per KV head: KV is streamed once, everything else stays in the first cache.

// Keys per round: what a round reads of all heads shall still be near when it ends.
template <class Page> constexpr int64_t KEYS = sizeof(Page) == 1 ? 32 : 16;

// scores[r][t] = q[r] . k, for one row of K.
template <int ROWS, class Q, class Page>
INLINE void score(const Page *k, const Q *q, int64_t dim, int64_t t, float *scores) {
  vec sums[ROWS] = {};
  int64_t i = 0;
#if LEVEL >= 2
  if constexpr (sizeof(Q) == 2 && sizeof(Page) <= 2)
    for (; i + 32 <= dim; i += 32) {
      const auto key = (__m512bh)read_32(k, i, dim);
      for (int r = 0; r < ROWS; r++)
        sums[r] = _mm512_dpbf16_ps(sums[r], key, (__m512bh)_mm512_loadu_si512(q + r * dim + i));
    }
#endif
  for (; i + WIDTH <= dim; i += WIDTH) {
    const vec key = read(k, i, dim);
    for (int r = 0; r < ROWS; r++) sums[r] += key * load(q + r * dim + i);
  }
  for (int r = 0; r < ROWS; r++) {
    float total = sum(sums[r]);
    for (int64_t j = i; j < dim; j++) total += read_one(k, j, dim) * get(q + r * dim + j);
    scores[r * KEYS<Page> + t] = total;
  }
}

#if LEVEL >= 2
// Interleave two rows of V, 32 numbers each: dimensions 0-15, then 16-31, of one and the other.
struct Interleave {
  __m512i low, high;

  METHOD static Interleave make() {
    alignas(64) uint16_t index[2][32];
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 16; i++) {
        index[half][2 * i] = static_cast<uint16_t>(16 * half + i);
        index[half][2 * i + 1] = static_cast<uint16_t>(16 * half + i + 32);
      }
    return {_mm512_load_si512(index[0]), _mm512_load_si512(index[1])};
  }
};

// values[r] = values[r] * factors[r] + weights[r] times the rows of V, two keys at a time.
template <int ROWS, class Page>
INLINE void add_pairs(const Page *v, const int64_t *offsets, int64_t count, int64_t dim,
                      const float *weights, const float *factors, float *values) {
  const Interleave interleave = Interleave::make();
  alignas(64) bf16 narrowed[ROWS][KEYS<Page>];
  for (int r = 0; r < ROWS; r++) copy(weights + r * KEYS<Page>, narrowed[r], KEYS<Page>);
  for (int64_t i = 0; i < dim; i += 32) {
    vec sums[ROWS][2];
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < 2; j++)
        sums[r][j] = load(values + r * dim + i + 16 * j) * factors[r];
    for (int64_t t = 0; t < count; t += 2) {  // the weight of a key beyond the last is 0
      const __m512i even = read_32(v + offsets[t], i, dim);
      const __m512i odd = read_32(v + offsets[t + 1 < count ? t + 1 : t], i, dim);
      const auto low = (__m512bh)_mm512_permutex2var_epi16(even, interleave.low, odd);
      const auto high = (__m512bh)_mm512_permutex2var_epi16(even, interleave.high, odd);
      for (int r = 0; r < ROWS; r++) {
        int32_t both;
        __builtin_memcpy(&both, &narrowed[r][t], 4);
        const auto weight = (__m512bh)_mm512_set1_epi32(both);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], low, weight);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], high, weight);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < 2; j++) store(values + r * dim + i + 16 * j, sums[r][j]);
  }
}
#endif

// The same for any type.
template <int ROWS, class Page>
INLINE void add_values(const Page *v, const int64_t *offsets, int64_t count, int64_t dim,
                       const float *weights, const float *factors, float *values) {
  int64_t i = 0;
  for (; i + WIDTH <= dim; i += WIDTH) {
    vec sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = load(values + r * dim + i) * factors[r];
    for (int64_t t = 0; t < count; t++) {
      const vec value = read(v + offsets[t], i, dim);
      for (int r = 0; r < ROWS; r++) sums[r] += splat(weights[r * KEYS<Page> + t]) * value;
    }
    for (int r = 0; r < ROWS; r++) store(values + r * dim + i, sums[r]);
  }
  for (; i < dim; i++)
    for (int r = 0; r < ROWS; r++) {
      float total = values[r * dim + i] * factors[r];
      for (int64_t t = 0; t < count; t++)
        total += weights[r * KEYS<Page> + t] * read_one(v + offsets[t], i, dim);
      values[r * dim + i] = total;
    }
}

// Some queries of a piece for some KV heads: row i is query first_row + i % ROWS of KV head
// first_head + i / ROWS.
template <class In, class Page, int ROWS>
struct Few {
  const Attention &a;
  const Step &step;
  const Plan &plan;
  const Piece &piece;
  int64_t first_head, heads, first_row, group;

  METHOD int64_t token_of(int64_t i) const { return piece.token + (first_row + i % ROWS) / group; }
  METHOD int64_t head_of(int64_t i) const {
    return (first_head + i / ROWS) * group + (first_row + i % ROWS) % group;
  }

  METHOD void run(const In *queries, int64_t query_stride, In *out, int64_t out_stride) const {
    const Segment &s = plan.segments.data[piece.segment];
    const int64_t dim = a.head_dim, all = heads * ROWS;
    auto *scores = static_cast<float *>(thread_scratch(SCORES, all * (KEYS<Page> + 2 * dim + 3) * 4));
    float *values = scores + all * KEYS<Page>, *factors = values + all * dim;
    auto *q = reinterpret_cast<In *>(factors + all);
    const Softmax softmax{a, factors + all + all * dim, factors + 2 * all + all * dim};
    for (int64_t i = 0; i < all; i++) {
      copy(queries + token_of(i) * query_stride + head_of(i) * dim, q + i * dim, dim);
      softmax.most[i] = HIDDEN_SCORE;
      softmax.total[i] = 0;
    }
    __builtin_memset(values, 0, all * dim * 4);
    const int64_t last_position = step.positions[piece.token + piece.tokens - 1];
    const int64_t begin = first_seen(a, s, step.positions[piece.token]);
    const int64_t end = end_seen(s, last_position);
    for (int64_t first = begin; first < end; first += KEYS<Page>)
      round(s, q, first, end, softmax, scores, factors, values);
    for (int64_t i = 0; i < all; i++) {
      const int64_t token = token_of(i), head = head_of(i);
      float *found = s.found < 0 ? nullptr
                                 : plan.found.data + s.found +
                                       (token - s.token) * a.heads * (dim + 2);
      finish_row(a, softmax.most[i], softmax.total[i], values + i * dim, found, head,
                 out + token * out_stride + head * dim);
    }
  }

  METHOD void round(const Segment &s, const In *q, int64_t first, int64_t end,
                    const Softmax &softmax, float *scores, float *factors, float *values) const {
    const int64_t dim = a.head_dim, count = smaller(KEYS<Page>, end - first);
    const int64_t next = smaller(KEYS<Page>, end - first - count);
    const int64_t size = head_size<Page>(dim);
    const auto *keys = static_cast<const Page *>(a.keys) + first_head * size;
    const auto *pages = static_cast<const Page *>(a.values) + first_head * size;
    int64_t offsets[2 * KEYS<Page>];
    find_rows<Page>(a, s, first, count + next, offsets);
    for (int64_t t = 0; t < count; t++) {
      if (t < next) fetch(keys + offsets[count + t], heads * size);
      fetch(pages + offsets[t], heads * size);
      for (int64_t head = 0; head < heads; head++)
        score<ROWS>(keys + offsets[t] + head * size, q + head * ROWS * dim, dim, t,
                    scores + head * ROWS * KEYS<Page>);
    }
    for (int64_t i = 0; i < heads * ROWS; i++) {
      const int64_t position = step.positions[token_of(i)];
      float *weights = scores + i * KEYS<Page>;  // in place
      factors[i] = softmax.weigh(weights, weights, i, first, KEYS<Page>, first_seen(a, s, position),
                                 smaller(end, end_seen(s, position)));
    }
    for (int64_t head = 0; head < heads; head++) {
      const float *weights = scores + head * ROWS * KEYS<Page>, *factor = factors + head * ROWS;
      float *to = values + head * ROWS * dim;
#if LEVEL >= 2
      if constexpr (sizeof(In) == 2 && sizeof(Page) <= 2)
        if (dim % 32 == 0) {
          add_pairs<ROWS>(pages + head * size, offsets, count, dim, weights, factor, to);
          continue;
        }
#endif
      add_values<ROWS>(pages + head * size, offsets, count, dim, weights, factor, to);
    }
  }
};

// The queries of `piece` for KV heads first_head .. last_head - 1.
template <class In, class Page>
INLINE void attend_few(const Attention &a, const Step &step, const Plan &plan, const Piece &piece,
                       int64_t first_head, int64_t last_head, const In *queries,
                       int64_t query_stride, In *out, int64_t out_stride) {
  const int64_t group = a.heads / a.kv_heads, rows = piece.tokens * group;
  for (int64_t row = 0; row < rows; row += FEW_ROWS)
    for_count<FEW_ROWS>(rows - row, [&](auto count) {
      const Few<In, Page, count.value> few{
          a, step, plan, piece, first_head, last_head - first_head, row, group};
      few.run(queries, query_stride, out, out_stride);
    });
}
