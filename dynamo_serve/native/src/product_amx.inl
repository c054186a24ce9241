// Linear layers on AMX: tiles of 16 rows by 64 bytes. C = tiles 0-3, A (tokens) 4-5, B (outputs) 6-7.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Every thread, at the start of what uses tiles; other libraries may have set them up their way.
INLINE void configure_tiles() {
  static const TileConfig config;
  asm volatile("" ::: "memory");  // gcc 12 believes that only 8 bytes are read
  _tile_loadconfig(&config);
}

#define MULTIPLY(c, a, b)                          \
  if constexpr (INT) _tile_dpbssd(c, a, b);        \
  else _tile_dpbf16ps(c, a, b)

// What is fetched while tiles are multiplied: the weights that come next, into the second cache, and
// the lines that the sums will be written to, which otherwise stall every store.
struct Ahead {
  const char *weights, *weights_end;
  int64_t lines;  // of weights, per step
  const char *out = nullptr;
  int64_t out_stride = 0, out_rows = 0, out_bytes = 0;

  METHOD void fetch() {
    for (int64_t i = 0; i < lines && weights < weights_end; i++, weights += 64)
      _mm_prefetch(weights, _MM_HINT_T1);
    for (int64_t i = 0; i < 3 && out_rows > 0; i++, out_rows--, out += out_stride) {
      __builtin_prefetch(out, 1, 3);
      if (out_bytes > 64) __builtin_prefetch(out + 64, 1, 3);
    }
  }
};

// Add up to 32 tokens (`ROWS` tiles of 16) by one panel over `steps` tile depths to `sums` [32][32].
template <bool INT, int ROWS>
INLINE void tile_block(const char *x, int64_t stride, const char *w, int64_t steps, bool first,
                       void *sums, Ahead &ahead) {
  auto *to = static_cast<char *>(sums);
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (ROWS > 1) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, to, 128);
    _tile_loadd(1, to + 64, 128);
    if constexpr (ROWS > 1) {
      _tile_loadd(2, to + 2048, 128);
      _tile_loadd(3, to + 2048 + 64, 128);
    }
  }
  for (int64_t step = 0; step < steps; step++, w += 2048, x += 64) {
    _tile_stream_loadd(4, x, stride);  // read once: leave the first cache to the weights
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + 1024, 64);
    MULTIPLY(0, 4, 6);
    MULTIPLY(1, 4, 7);
    if constexpr (ROWS > 1) {
      _tile_stream_loadd(5, x + 16 * stride, stride);
      MULTIPLY(2, 5, 6);
      MULTIPLY(3, 5, 7);
    }
    ahead.fetch();
  }
  _tile_stored(0, to, 128);
  _tile_stored(1, to + 64, 128);
  if constexpr (ROWS > 1) {
    _tile_stored(2, to + 2048, 128);
    _tile_stored(3, to + 2048 + 64, 128);
  }
}

// 48 tokens by one panel: weights are read once for all of them, where reading is what takes the time.
// C = tiles 0-5, A 6, B 7.
template <bool INT>
INLINE void tall_block(const char *x, int64_t stride, const char *w, int64_t steps, void *sums,
                       Ahead &ahead) {
  const int64_t below = 16 * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t step = 0; step < steps; step++, w += 2048, x += 64) {
    _tile_loadd(7, w, 64);
    _tile_loadd(6, x, stride);
    MULTIPLY(0, 6, 7);
    _tile_loadd(6, x + below, stride);
    MULTIPLY(2, 6, 7);
    _tile_loadd(6, x + 2 * below, stride);
    MULTIPLY(4, 6, 7);
    _tile_loadd(7, w + 1024, 64);
    MULTIPLY(5, 6, 7);
    _tile_loadd(6, x + below, stride);
    MULTIPLY(3, 6, 7);
    _tile_loadd(6, x, stride);
    MULTIPLY(1, 6, 7);
    ahead.fetch();
  }
  auto *to = static_cast<char *>(sums);
  _tile_stored(0, to, 128);
  _tile_stored(1, to + 64, 128);
  _tile_stored(2, to + 2048, 128);
  _tile_stored(3, to + 2048 + 64, 128);
  _tile_stored(4, to + 4096, 128);
  _tile_stored(5, to + 4096 + 64, 128);
}

template <bool INT, class To>
INLINE void take_block(const Linear &l, int64_t token, int64_t count, int64_t panel, float *sums,
                       const float *factors, const To &to) {
  for (int64_t i = 0; i < count; i++) {
    float *row = sums + i * PANEL;
    if constexpr (INT)
      for (int64_t j = 0; j < PANEL; j += 16)
        store(row + j, _mm512_cvtepi32_ps(_mm512_load_si512(row + j)));
    to.take(l, token + i, panel, row, INT ? factors[token + i] : 1.0f);
  }
}

constexpr int64_t STEPS_IN_L1 = 16;   // a panel's 2 KiB a step that stay in the first cache
constexpr int64_t FEW_TOKENS = 96;    // for which whole panels are read at once
constexpr int64_t PANELS_TOGETHER = 4;  // that share a part of the tokens' rows in the second cache

// Tokens in a block: 48 where that saves reading the weights once more.
INLINE int64_t block_height(int64_t tokens) {
  const bool saves = divide_up(tokens, 48) < divide_up(tokens, 32);
  return tokens <= FEW_TOKENS && saves ? 48 : 32;
}

// Panels first .. last - 1 for all tokens: parts of the inputs outermost, so that tokens' rows and
// weights of one part are read from near caches. `sums` has 4 KiB per panel and 32 tokens.
template <bool INT, class To>
INLINE void tile_run(const Linear &l, const char *x, int64_t stride, const float *factors,
                     int64_t tokens, int64_t first, int64_t last, float *sums, const To &to) {
  const int64_t steps = divide_up(l.inputs, INT ? 64 : 32), bytes = steps * 2048;
  const int64_t height = block_height(tokens), blocks = divide_up(tokens, height);
  const int64_t part = blocks == 1 || height > 32 ? steps : STEPS_IN_L1;
  const auto *weights = static_cast<const char *>(l.weights) + first * bytes;
  const char *end = weights + (last - first) * bytes;
  for (int64_t from = 0; from < steps; from += part) {
    const int64_t now = smaller(part, steps - from);
    const bool done = from + now == steps;
    for (int64_t panel = 0; panel < last - first; panel++) {
      const char *w = weights + panel * bytes + from * 2048;
      const char *next = blocks == 1               ? w + 8192
                         : panel + 1 < last - first ? w + bytes
                         : done                     ? end
                                                    : weights + (from + now) * 2048;
      Ahead ahead{next, end + bytes, divide_up(32, blocks)};
      for (int64_t block = 0; block < blocks; block++) {
        const int64_t token = block * height, count = smaller(height, tokens - token);
        const char *rows = x + token * stride + from * 64;
        // Whole panels are done at once: all of them can use the same sums.
        float *block_sums = sums + (part == steps ? 0 : panel * blocks + block) * height * PANEL;
        if (done) to.announce(ahead, token, count, first + panel);
        if (count > 32)
          tall_block<INT>(rows, stride, w, now, block_sums, ahead);
        else if (count > 16)
          tile_block<INT, 2>(rows, stride, w, now, from == 0, block_sums, ahead);
        else
          tile_block<INT, 1>(rows, stride, w, now, from == 0, block_sums, ahead);
        if (done) take_block<INT>(l, token, count, first + panel, block_sums, factors, to);
      }
    }
  }
}

constexpr int64_t TOKENS_TOGETHER = 512;

// `x` has rows for a multiple of 32 tokens, `factors` (int8) one number per token.
template <bool INT, class To>
INLINE void tile_panels(const Linear &l, const char *x, int64_t stride, const float *factors,
                        int64_t tokens, const To &to) {
  const int64_t grain = tokens <= 48 ? panels_per_task(l) : PANELS_TOGETHER;
  const int64_t rows = round_up(smaller(tokens, TOKENS_TOGETHER), 32);  // no less than blocks need
  for_panels(l, grain, [&](int64_t first, int64_t last) {
    configure_tiles();
    auto *sums = static_cast<float *>(thread_scratch(SUMS, rows * (last - first) * PANEL * 4));
    for (int64_t token = 0; token < tokens; token += TOKENS_TOGETHER)
      tile_run<INT>(l, x + token * stride, stride, INT ? factors + token : nullptr,
                    smaller(TOKENS_TOGETHER, tokens - token), first, last, sums, to.from(token));
  });
}

template <class To>
INLINE void narrow_product(const Linear &l, const bf16 *x, int64_t stride, int64_t tokens,
                         const To &to) {
  if (l.type != INT8) {
    tile_panels<false>(l, reinterpret_cast<const char *>(x), stride * 2, nullptr, tokens, to);
    return;
  }
  const Quantized q = quantize_rows(x, l.inputs, stride, tokens);
  tile_panels<true>(l, reinterpret_cast<const char *>(q.whole), q.stride, q.factors, tokens, to);
}
