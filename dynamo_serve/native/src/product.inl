// Linear layers over packed weights: y = x W^T. Outputs come in panels of 32, so that a thread reads
// one stretch of memory from end to end; what happens to a finished row of 32 is a `Sink`.
//
// Layouts of a panel, `inputs` padded with zeros to a multiple of DEPTH:
//   plain   [inputs][32]                                             any type, widened when read
//   groups  [inputs / 2][32][2]                         bfloat16     (what vdpbf16ps wants)
//           [inputs / 4][32][4]                         int8 + 128   (what vpdpbusd wants)
//   tiles   [inputs / 32][2][16 pairs][16 outputs][2]   bfloat16     (what AMX wants)
//           [inputs / 64][2][16 fours][16 outputs][4]   int8
// A gated panel holds 16 gates and the 16 ups that belong to them.

constexpr int64_t PANEL = 32;

// Whether products narrow what comes in, and so want the weights of several inputs side by side.
INLINE bool is_narrow(int32_t type) {
  return LEVEL >= 2 && type != FLOAT32;
}
INLINE int64_t depth_of(int32_t type) { return !is_narrow(type) ? 1 : type == INT8 ? 64 : 32; }
INLINE int64_t size_of(int32_t type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }
INLINE int64_t panel_bytes(const Linear &l) {
  return round_up(l.inputs, depth_of(l.type)) * PANEL * size_of(l.type);
}

// Where output `column` of a panel comes from among the rows of the weights, or -1 for padding.
INLINE int64_t source_row(int64_t panel, int64_t column, int64_t outputs, bool gated) {
  const int64_t half = outputs / 2, i = panel * 16 + column % 16;
  if (gated) return i < half ? (column < 16 ? i : half + i) : -1;
  const int64_t row = panel * PANEL + column;
  return row < outputs ? row : -1;
}

enum SinkMode { REPLACE, ADD, GATE };

// Takes 32 finished sums of one token and one panel.
template <class Out, SinkMode MODE>
struct Sink {
  Out *out;
  int64_t stride;  // from token to token
  int32_t activation;

  METHOD Sink from(int64_t token) const { return {out + token * stride, stride, activation}; }

  METHOD static vec scaled(const Linear &l, int64_t first, int64_t i, vec x, float factor) {
    if (l.scales != nullptr) x *= load(l.scales + first + i) * factor;
    if (l.bias != nullptr) x += load(l.bias + first + i);
    return x;
  }

  METHOD void take(const Linear &l, int64_t token, int64_t panel, float *y, float factor) const {
    const int64_t first = panel * PANEL;
    if (l.scales != nullptr || l.bias != nullptr)
      for (int64_t i = 0; i < PANEL; i += WIDTH)
        store(y + i, scaled(l, first, i, load(y + i), factor));
    if constexpr (MODE == GATE) {
      Out *to = out + token * stride + panel * 16;
      const int64_t n = smaller(16, l.outputs / 2 - panel * 16);
      for (int64_t i = 0; i < 16; i += WIDTH)
        store(y + i, activate(load(y + i), activation) * load(y + 16 + i));
      put_all(to, y, n);
    } else {
      put_all(out + token * stride + first, y, smaller(PANEL, l.outputs - first));
    }
  }

  // Say where `count` tokens' sums will go, to have these lines fetched.
  template <class Ahead>
  METHOD void announce(Ahead &ahead, int64_t token, int64_t count, int64_t panel) const {
    constexpr int64_t width = MODE == GATE ? 16 : PANEL;
    ahead.out = reinterpret_cast<const char *>(out + token * stride + panel * width);
    ahead.out_stride = stride * static_cast<int64_t>(sizeof(Out));
    ahead.out_rows = count;
    ahead.out_bytes = width * static_cast<int64_t>(sizeof(Out));
  }

  METHOD static void put_all(Out *to, const float *y, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
      store(to + i, MODE == ADD ? load(to + i) + load(y + i) : load(y + i));
    for (; i < n; i++) put(to + i, MODE == ADD ? get(to + i) + y[i] : y[i]);
  }
};

// Panels per task: enough tasks that a thread without a core holds nobody up, long stretches else.
INLINE int64_t panels_per_task(const Linear &l) {
  return larger(1, divide_up(l.outputs, PANEL) / (static_cast<int64_t>(num_threads()) * 8));
}

// Call `body(first, last)` for runs of `grain` panels.
template <class Body>
INLINE void for_panels(const Linear &l, int64_t grain, const Body &body) {
  const int64_t panels = divide_up(l.outputs, PANEL);
  parallel(divide_up(panels, grain),
           [&](int64_t task) { body(task * grain, smaller((task + 1) * grain, panels)); });
}

// With several rows to do for each stretch of weights, a processor does not look far enough for
// the next by itself. Where these were read just now, by the rows before, `ahead` is 0.
constexpr int64_t AHEAD = 8192;  // bytes
INLINE void fetch_ahead(const void *weights, int64_t bytes, int64_t ahead) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm_prefetch(static_cast<const char *>(weights) + ahead + i, _MM_HINT_T0);
}

// ── plain: float activations, weights of any type ─────────────────────────────────────────────

template <int ROWS, class W, class To>
INLINE void plain_block(const Linear &l, const W *w, const float *x, int64_t stride, int64_t token,
                        int64_t panel, int64_t ahead, const To &to) {
  constexpr int PARTS = PANEL / WIDTH;
  vec sums[ROWS][PARTS] = {};
  for (int64_t k = 0; k < l.inputs; k++) {
    vec part[PARTS];
    fetch_ahead(w + k * PANEL, PANEL * sizeof(W), ahead);
    for (int i = 0; i < PARTS; i++) part[i] = load(w + k * PANEL + i * WIDTH);
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < PARTS; i++) sums[r][i] += splat(x[(token + r) * stride + k]) * part[i];
  }
  for (int r = 0; r < ROWS; r++) {
    alignas(64) float y[PANEL];
    for (int i = 0; i < PARTS; i++) store(y + i * WIDTH, sums[r][i]);
    to.take(l, token + r, panel, y, 1.0f);
  }
}

template <class W, class To>
INLINE void plain_product(const Linear &l, const float *x, int64_t stride, int64_t tokens,
                          const To &to) {
  constexpr int ROWS = LEVEL >= 1 ? 8 : 3;
  for_panels(l, panels_per_task(l), [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      const W *w = static_cast<const W *>(l.weights) + panel * PANEL * l.inputs;
      for (int64_t token = 0; token < tokens; token += ROWS)
        for_count<ROWS>(tokens - token, [&](auto rows) {
          plain_block<rows.value>(l, w, x, stride, token, panel, token == 0 ? AHEAD : 0, to);
        });
    }
  });
}
