// Many queries of one KV head: a round packs some keys and values into tiles once and runs all
// queries of the piece over them, as in FlashAttention (Dao et al. 2022).

constexpr int64_t ROUND = 128;  // keys

// Turn a 16 x 16 block of 32-bit words over.
INLINE void transpose(__m512i *r) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

template <class Page>
struct Round {
  const Attention &a;
  const Segment &s;
  int64_t head, first, count;  // keys first .. first + count - 1; the rest of the round is zeros
  int64_t offsets[ROUND];

  METHOD Round(const Attention &a, const Segment &s, int64_t head, int64_t first, int64_t count)
      : a(a), s(s), head(head), first(first), count(count) {
    find_rows<Page>(a, s, first, count, offsets);
  }

  METHOD __m512i part(const void *pages, int64_t key, int64_t from) const {
    if (key >= count) return _mm512_setzero_si512();
    return read_32(static_cast<const Page *>(pages) + offsets[key] +
                       head * head_size<Page>(a.head_dim),
                   from, a.head_dim);
  }

  // [16 keys each][head_dim / 32] tiles of [16 pairs of the head][16 keys][2].
  METHOD void pack_keys(__m512i *to) const {
    for (int64_t key = 0; key < round_up(count, 32); key += 16)
      for (int64_t from = 0; from < a.head_dim; from += 32, to += 16) {
        for (int64_t i = 0; i < 16; i++) to[i] = part(a.keys, key + i, from);
        transpose(to);
      }
  }

  // [32 keys each][head_dim / 16] tiles of [16 pairs of keys][16 of the head][2].
  METHOD void pack_values(__m512i *to) const {
    const Interleave interleave = Interleave::make();
    for (int64_t key = 0; key < round_up(count, 32); key += 32)
      for (int64_t from = 0; from < a.head_dim; from += 32, to += 32)
        for (int64_t i = 0; i < 16; i++) {
          const __m512i even = part(a.values, key + 2 * i, from);
          const __m512i odd = part(a.values, key + 2 * i + 1, from);
          to[i] = _mm512_permutex2var_epi16(even, interleave.low, odd);
          to[16 + i] = _mm512_permutex2var_epi16(even, interleave.high, odd);
        }
  }
};

#if LEVEL >= 3
// C [32][32] (row stride `c_stride` bytes) = or += A [32][32 * steps] times two columns of tiles.
INLINE void multiply_32(const char *a, int64_t a_stride, const char *b0, const char *b1,
                        int64_t b_step, int64_t steps, float *c, int64_t c_stride, bool add) {
  auto *to = reinterpret_cast<char *>(c);
  if (add) {
    _tile_loadd(0, to, c_stride);
    _tile_loadd(1, to + 64, c_stride);
    _tile_loadd(2, to + 16 * c_stride, c_stride);
    _tile_loadd(3, to + 16 * c_stride + 64, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step++, a += 64, b0 += b_step, b1 += b_step) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, b0, 64);
    _tile_loadd(7, b1, 64);
    _tile_loadd(5, a + 16 * a_stride, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, c_stride);
  _tile_stored(1, to + 64, c_stride);
  _tile_stored(2, to + 16 * c_stride, c_stride);
  _tile_stored(3, to + 16 * c_stride + 64, c_stride);
}
#else
INLINE void configure_tiles() {}

// The same without tiles.
INLINE void multiply_32(const char *a, int64_t a_stride, const char *b0, const char *b1,
                        int64_t b_step, int64_t steps, float *c, int64_t c_stride, bool add) {
  constexpr int ROWS = 8;
  for (int64_t row = 0; row < 32; row += ROWS) {
    vec sums[ROWS][2] = {};
    float *to = c + row * (c_stride / 4);
    if (add)
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++) sums[r][j] = load(to + r * (c_stride / 4) + 16 * j);
    for (int64_t step = 0; step < steps; step++)
      for (int64_t pair = 0; pair < 16; pair++) {
        const auto low = (__m512bh)_mm512_loadu_si512(b0 + step * b_step + pair * 64);
        const auto high = (__m512bh)_mm512_loadu_si512(b1 + step * b_step + pair * 64);
        for (int r = 0; r < ROWS; r++) {
          int32_t both;
          __builtin_memcpy(&both, a + (row + r) * a_stride + step * 64 + pair * 4, 4);
          const auto x = (__m512bh)_mm512_set1_epi32(both);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, low);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, high);
        }
      }
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < 2; j++) store(to + r * (c_stride / 4) + 16 * j, sums[r][j]);
  }
}
#endif

// A task's memory; rows are padded to a multiple of 32.
struct Workspace {
  bf16 *queries, *weights;  // [rows][head_dim], [rows][ROUND]
  float *scores, *values;   // [rows][ROUND], [rows][head_dim]
  float *most, *total;      // [rows]
  __m512i *key_tiles, *value_tiles;

  METHOD static Workspace of(int64_t rows, int64_t dim) {
    const int64_t sizes[] = {rows * dim * 2, rows * ROUND * 2, rows * ROUND * 4, rows * dim * 4,
                             rows * 4,       rows * 4,         ROUND * dim * 2,  ROUND * dim * 2};
    int64_t all = 0;
    for (const int64_t size : sizes) all += round_up(size, 64);
    auto *memory = static_cast<char *>(thread_scratch(PACKED, all));
    char *parts[8];
    for (int i = 0; i < 8; memory += round_up(sizes[i], 64), i++) parts[i] = memory;
    return {reinterpret_cast<bf16 *>(parts[0]),    reinterpret_cast<bf16 *>(parts[1]),
            reinterpret_cast<float *>(parts[2]),   reinterpret_cast<float *>(parts[3]),
            reinterpret_cast<float *>(parts[4]),   reinterpret_cast<float *>(parts[5]),
            reinterpret_cast<__m512i *>(parts[6]), reinterpret_cast<__m512i *>(parts[7])};
  }
};

// One round: scores, weights, and what they make of the values.
template <class Page>
INLINE void run_round(const Workspace &w, const Round<Page> &round, const Step &step, const Piece &piece,
                      int64_t rows) {
  const Attention &a = round.a;
  const int64_t dim = a.head_dim, group = a.heads / a.kv_heads, padded = round_up(rows, 32);
  const int64_t keys = round_up(round.count, 32), key_column = dim / 32 * 1024;
  const auto *key_tiles = reinterpret_cast<const char *>(w.key_tiles);
  const auto *value_tiles = reinterpret_cast<const char *>(w.value_tiles);
  round.pack_keys(w.key_tiles);
  round.pack_values(w.value_tiles);
  for (int64_t row = 0; row < padded; row += 32)
    for (int64_t key = 0; key < keys; key += 32) {
      const char *tiles = key_tiles + key / 16 * key_column;
      multiply_32(reinterpret_cast<const char *>(w.queries + row * dim), dim * 2, tiles,
                  tiles + key_column, 1024, dim / 32, w.scores + row * ROUND + key, ROUND * 4,
                  false);
    }
  const Softmax softmax{a, w.most, w.total};
  for (int64_t row = 0; row < rows; row++) {
    const int64_t position = step.positions[piece.token + row / group];
    const float factor = softmax.weigh(
        w.scores + row * ROUND, w.weights + row * ROUND, row, round.first, keys,
        first_seen(a, round.s, position),
        smaller(round.first + round.count, end_seen(round.s, position)));
    if (factor != 1.0f)
      for (int64_t i = 0; i < dim; i += WIDTH)
        store(w.values + row * dim + i, load(w.values + row * dim + i) * factor);
  }
  for (int64_t row = 0; row < padded; row += 32)
    for (int64_t from = 0; from < dim; from += 32) {
      const char *tiles = value_tiles + from / 16 * 1024;
      multiply_32(reinterpret_cast<const char *>(w.weights + row * ROUND), ROUND * 2, tiles,
                  tiles + 1024, dim / 16 * 1024, keys / 32, w.values + row * dim + from, dim * 4,
                  true);
    }
}

template <class Page>
INLINE void attend_many(const Attention &a, const Step &step, const Plan &plan, const Piece &piece,
                        int64_t head, const bf16 *queries, int64_t query_stride, bf16 *out,
                        int64_t out_stride) {
  configure_tiles();
  const Segment &s = plan.segments.data[piece.segment];
  const int64_t dim = a.head_dim, group = a.heads / a.kv_heads, rows = piece.tokens * group;
  const int64_t padded = round_up(rows, 32);
  const Workspace w = Workspace::of(padded, dim);
  __builtin_memset(w.queries, 0, padded * dim * 2);
  __builtin_memset(w.weights, 0, padded * ROUND * 2);
  __builtin_memset(w.values, 0, padded * dim * 4);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = piece.token + row / group, query = head * group + row % group;
    copy(queries + token * query_stride + query * dim, w.queries + row * dim, dim);
    w.most[row] = HIDDEN_SCORE;
    w.total[row] = 0;
  }
  const int64_t begin = first_seen(a, s, step.positions[piece.token]);
  const int64_t end = end_seen(s, step.positions[piece.token + piece.tokens - 1]);
  for (int64_t first = begin; first < end; first += ROUND)
    run_round(w, Round<Page>(a, s, head, first, smaller(ROUND, end - first)), step, piece, rows);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = piece.token + row / group, query = head * group + row % group;
    float *found = s.found < 0 ? nullptr
                               : plan.found.data + s.found +
                                     (token - s.token) * a.heads * (dim + 2);
    finish_row(a, w.most[row], w.total[row], w.values + row * dim, found, query,
               out + token * out_stride + query * dim);
  }
}
