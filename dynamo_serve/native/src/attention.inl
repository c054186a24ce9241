// Paged attention. A step is cut into segments: some neighbouring tokens of the step, and a stretch
// of KV that all of them see. Rows that begin with the same pages get one segment for these, so
// that shared KV is read once for all of them; what a token's segments found is merged by
// log-sum-exp at the end (as in FlashDecoding, Dao et al. 2023).

constexpr float HIDDEN_SCORE = -1e30f;  // finite: a stretch that a token sees nothing of stays 0

struct Segment {
  int32_t token, tokens;        // of the step
  int32_t kv_begin, kv_end;     // a causal segment's tokens see less: up to their own position
  const int32_t *pages;         // of the sequence's beginning
  int64_t found;                // where its results start in `Plan::found`, or -1: it is the only one
  bool causal;
};

struct Piece {  // what one task works on: tokens of a segment
  int32_t segment, token, tokens;
};

struct Plan {
  Buffer<Segment> segments;
  Buffer<Piece> pieces;
  Buffer<int32_t> shared;  // [rows] the row's shared segment, or -1
  Buffer<int32_t> own;     // [rows] its own one
  Buffer<float> found;     // results of segments that are merged
  int64_t num_segments = 0, num_pieces = 0, num_found = 0;
};

// ── planning, once for all layers of a step that have one window ───────────────────────────────

INLINE int64_t position_of(const Step &step, int64_t row) {
  return step.positions[step.starts[row]];
}

// How many full pages the rows first .. last - 1 have in common before any of their new tokens.
INLINE int64_t common_pages(const Step &step, int64_t first, int64_t row, int64_t most,
                            int64_t page_size) {
  const int32_t *a = step.pages + step.page_starts[first], *b = step.pages + step.page_starts[row];
  most = smaller(most, position_of(step, row) / page_size);
  int64_t count = 0;
  while (count < most && a[count] == b[count]) count++;
  return count;
}

INLINE int64_t add_segment(Plan &plan, const Step &step, int64_t row, int64_t tokens, int64_t begin,
                           int64_t end, bool causal, bool merged, int64_t result_size) {
  Segment &s = plan.segments.at(plan.num_segments);
  s.token = step.starts[row];
  s.tokens = static_cast<int32_t>(tokens);
  s.kv_begin = static_cast<int32_t>(begin);
  s.kv_end = static_cast<int32_t>(end);
  s.pages = step.pages + step.page_starts[row];
  s.causal = causal;
  s.found = merged ? plan.num_found : -1;
  if (merged) plan.num_found += tokens * result_size;
  return plan.num_segments++;
}

// Fewer shared pages than this are read again by everybody: merging costs, too.
constexpr int64_t MIN_SHARED_PAGES = 4;

INLINE void plan_segments(Plan &plan, const Attention &a, const Step &step) {
  plan.num_segments = plan.num_found = 0;
  const int64_t result_size = a.heads * (a.head_dim + 2);
  int64_t row = 0;
  while (row < step.num_rows) {
    int64_t last = row + 1, common = position_of(step, row) / a.page_size;
    while (a.window == 0 && last < step.num_rows) {
      const int64_t now = common_pages(step, row, last, common, a.page_size);
      if (now < MIN_SHARED_PAGES) break;
      common = now;
      last++;
    }
    const bool sharing = last > row + 1;
    const int64_t tokens = step.starts[last] - step.starts[row];
    const int64_t shared =
        sharing ? add_segment(plan, step, row, tokens, 0, common * a.page_size, false, true,
                              result_size)
                : -1;
    for (; row < last; row++) {
      const int64_t first = position_of(step, row), length = step.starts[row + 1] - step.starts[row];
      const int64_t seen = a.window > 0 ? larger(0, first - a.window + 1) : 0;
      const int64_t begin = sharing ? common * a.page_size : seen;
      plan.shared.at(row) = static_cast<int32_t>(shared);
      plan.own.at(row) = static_cast<int32_t>(add_segment(
          plan, step, row, length, begin, first + length, true, sharing, result_size));
    }
  }
  plan.found.at(plan.num_found) = 0;
}

// ── scores to weights, the same for all kernels ────────────────────────────────────────────────

// Rows of queries against one stretch of KV: running maximum, sum and weighted values of each.
struct Softmax {
  const Attention &a;
  float *most, *total;  // [rows]

  // Make `scores` of keys first .. first + count - 1 into weights, in place; keys outside
  // [low, high) are hidden. Returns the factor for what was summed up before.
  METHOD float weigh(float *scores, int64_t row, int64_t first, int64_t count, int64_t low,
                     int64_t high) const {
    int64_t i = 0;
    vec best = splat(HIDDEN_SCORE);
    for (; i < count; i += WIDTH) {
      vec s = load(scores + i) * a.scale;
      if (a.softcap > 0) s = hyperbolic_tangent(s / a.softcap) * a.softcap;
      if (first + i < low || first + i + WIDTH > high) {
        const ivec key = first_integers() + static_cast<int32_t>(first + i);
        s = key < static_cast<int32_t>(low) || key >= static_cast<int32_t>(high)
                ? splat(HIDDEN_SCORE)
                : s;
      }
      store(scores + i, s);
      best = larger(best, s);
    }
    const float before = most[row], now = larger_float(before, largest(best));
    vec sums{};
    for (i = 0; i < count; i += WIDTH) {
      vec weight = exponential(load(scores + i) - now);
      if (now <= HIDDEN_SCORE) weight = vec{};  // nothing seen yet: not e^0
      store(scores + i, weight);
      sums += weight;
    }
    const float factor = before == now ? 1.0f : exponential(splat(before - now))[0];
    most[row] = now;
    total[row] = total[row] * factor + sum(sums);
    return factor;
  }

  METHOD static float larger_float(float a, float b) { return a > b ? a : b; }
};

// A row is finished: normalise it into `out`, or keep it to be merged.
template <class Out>
INLINE void finish_row(const Attention &a, float most, float total, const float *values,
                       float *found, int64_t head, Out *out) {
  const int64_t dim = a.head_dim;
  if (found != nullptr) {
    float *to = found + head * (dim + 2);
    to[0] = most;
    to[1] = total;
    copy(values, to + 2, dim);
    return;
  }
  if (a.sinks != nullptr) total += exponential(splat(a.sinks[head] - most))[0];
  const float factor = 1.0f / total;
  for (int64_t i = 0; i < dim; i++) put(out + i, values[i] * factor);
}

// The two results of a token of a sharing row, into `out` [heads, head_dim].
template <class Out>
INLINE void merge_token(const Attention &a, const float *one, const float *other, Out *out) {
  const int64_t dim = a.head_dim;
  for (int64_t head = 0; head < a.heads; head++) {
    const float *x = one + head * (dim + 2), *y = other + head * (dim + 2);
    const float most = x[0] > y[0] ? x[0] : y[0];
    const float fx = exponential(splat(x[0] - most))[0], fy = exponential(splat(y[0] - most))[0];
    float total = x[1] * fx + y[1] * fy;
    if (a.sinks != nullptr) total += exponential(splat(a.sinks[head] - most))[0];
    const float inverse = 1.0f / total;
    for (int64_t i = 0; i < dim; i++)
      put(out + head * dim + i, (x[2 + i] * fx + y[2 + i] * fy) * inverse);
  }
}

// ── few queries: KV is streamed once, everything else stays in the first cache ─────────────────

constexpr int64_t KEYS = 32;        // per round
constexpr int64_t FEW_ROWS = 8;     // queries per KV head

template <class Page>
INLINE const Page *kv_row(const Attention &a, const void *pages, const Segment &s, int64_t token) {
  const int64_t page = s.pages[token / a.page_size];
  return static_cast<const Page *>(pages) +
         (page * a.page_size + token % a.page_size) * a.kv_heads * a.head_dim;
}

template <class T>
INLINE float dot(const T *x, const float *y, int64_t n) {
  vec sums{};
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) sums += load(x + i) * load(y + i);
  float total = sum(sums);
  for (; i < n; i++) total += get(x + i) * y[i];
  return total;
}

// values[n] = values[n] * factor + weights[count] times the rows of V.
template <class Page>
INLINE void add_values(const Attention &a, const Segment &s, int64_t first, int64_t count,
                       int64_t head, const float *weights, float factor, float *values) {
  constexpr int PARTS = 4;
  const int64_t dim = a.head_dim;
  int64_t i = 0;
  for (; i + PARTS * WIDTH <= dim; i += PARTS * WIDTH) {
    vec sums[PARTS];
    for (int j = 0; j < PARTS; j++) sums[j] = load(values + i + j * WIDTH) * factor;
    for (int64_t t = 0; t < count; t++) {
      const Page *v = kv_row<Page>(a, a.values, s, first + t) + head * dim + i;
      for (int j = 0; j < PARTS; j++) sums[j] += splat(weights[t]) * load(v + j * WIDTH);
    }
    for (int j = 0; j < PARTS; j++) store(values + i + j * WIDTH, sums[j]);
  }
  for (; i < dim; i++) {
    float total = values[i] * factor;
    for (int64_t t = 0; t < count; t++)
      total += weights[t] * get(kv_row<Page>(a, a.values, s, first + t) + head * dim + i);
    values[i] = total;
  }
}

INLINE int64_t first_seen(const Attention &a, const Segment &s, int64_t position) {
  return s.causal && a.window > 0 ? larger(s.kv_begin, position - a.window + 1) : s.kv_begin;
}
INLINE int64_t end_seen(const Segment &s, int64_t position) {
  return s.causal ? smaller(s.kv_end, position + 1) : s.kv_end;
}

// The queries of `piece` (at most FEW_ROWS per KV head) for KV heads first_head .. last_head - 1.
template <class In, class Page>
INLINE void attend_few(const Attention &a, const Step &step, const Plan &plan, const Piece &piece,
                       int64_t first_head, int64_t last_head, const In *queries,
                       int64_t query_stride, In *out, int64_t out_stride) {
  const Segment &s = plan.segments.data[piece.segment];
  const int64_t dim = a.head_dim, group = a.heads / a.kv_heads, rows = piece.tokens * group;
  const int64_t heads = last_head - first_head, all = heads * rows;
  auto *memory = static_cast<float *>(thread_scratch(SCORES, all * (KEYS + 2 * dim + 2) * 4));
  float *scores = memory, *q = scores + all * KEYS, *values = q + all * dim;
  const Softmax softmax{a, values + all * dim, values + all * dim + all};
  for (int64_t i = 0; i < all; i++) {
    const int64_t head = (first_head + i / rows) * group + i % group;
    copy(queries + (piece.token + i % rows / group) * query_stride + head * dim, q + i * dim, dim);
    softmax.most[i] = HIDDEN_SCORE;
    softmax.total[i] = 0;
  }
  __builtin_memset(values, 0, all * dim * 4);
  const int64_t last_position = step.positions[piece.token + piece.tokens - 1];
  const int64_t begin = first_seen(a, s, step.positions[piece.token]);
  const int64_t end = end_seen(s, last_position);
  for (int64_t first = begin; first < end; first += KEYS) {
    const int64_t count = smaller(KEYS, end - first);
    for (int64_t t = 0; t < count; t++) {
      const Page *k = kv_row<Page>(a, a.keys, s, first + t) + first_head * dim;
      for (int64_t i = 0; i < all; i++)
        scores[i * KEYS + t] = dot(k + i / rows * dim, q + i * dim, dim);
    }
    for (int64_t i = 0; i < all; i++) {
      const int64_t position = step.positions[piece.token + i % rows / group];
      const float factor =
          softmax.weigh(scores + i * KEYS, i, first, KEYS, first_seen(a, s, position),
                        smaller(end, end_seen(s, position)));
      add_values<Page>(a, s, first, count, first_head + i / rows, scores + i * KEYS, factor,
                       values + i * dim);
    }
  }
  for (int64_t i = 0; i < all; i++) {
    const int64_t token = piece.token + i % rows / group;
    const int64_t head = (first_head + i / rows) * group + i % group;
    float *found = s.found < 0 ? nullptr
                               : plan.found.data + s.found +
                                     (token - s.token) * a.heads * (dim + 2);
    finish_row(a, softmax.most[i], softmax.total[i], values + i * dim, found, head,
               out + token * out_stride + head * dim);
  }
}
