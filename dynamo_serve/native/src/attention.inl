// Paged attention. A step is cut into segments: some neighbouring tokens of the step, and a stretch
// of KV that all of them see. Rows that begin with the same pages get one segment for these, so
// that shared KV is read once for all of them, and a long stretch for few queries is cut into parts
// where there are too few of them for all threads; what a token's segments found is merged by
// log-sum-exp at the end (as in FlashDecoding, Dao et al. 2023).

constexpr float HIDDEN_SCORE = -1e30f;  // finite: a stretch that a token sees nothing of stays 0
constexpr int64_t FEW_ROWS = 8;         // queries per KV head that are few
constexpr int64_t MIN_PART_TOKENS = 128;

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

struct Range {  // of segments
  int64_t first, end;
};

struct Plan {
  Buffer<Segment> segments;
  Buffer<Piece> pieces;
  Buffer<Range> shared;  // [rows] segments that the row shares with others
  Buffer<Range> own;     // [rows] those of its own
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

// Segments for `tokens` of the step and KV begin .. end - 1 of `row`, in parts of about `part` tokens
// where the queries are few; `merged` if they are not all that the tokens see.
INLINE Range add_segments(Plan &plan, const Attention &a, const Step &step, int64_t row,
                          int64_t tokens, int64_t begin, int64_t end, bool causal, bool merged,
                          int64_t part) {
  const bool few = tokens * (a.heads / a.kv_heads) <= FEW_ROWS;
  const int64_t parts = few ? larger(1, (end - begin + part / 2) / part) : 1;
  const int64_t length = round_up(divide_up(end - begin, parts), a.page_size);
  const Range range{plan.num_segments, plan.num_segments + divide_up(end - begin, length)};
  merged = merged || range.end - range.first > 1;
  for (; begin < end; begin += length) {
    Segment &s = plan.segments.at(plan.num_segments++);
    s.token = step.starts[row];
    s.tokens = static_cast<int32_t>(tokens);
    s.kv_begin = static_cast<int32_t>(begin);
    s.kv_end = static_cast<int32_t>(smaller(end, begin + length));
    s.pages = step.pages + step.page_starts[row];
    s.causal = causal;
    s.found = merged ? plan.num_found : -1;
    if (merged) plan.num_found += tokens * a.heads * (a.head_dim + 2);
  }
  return range;
}

// How long a part is where few queries see much: all threads shall have some.
INLINE int64_t part_length(const Attention &a, const Step &step) {
  int64_t all = 0;
  for (int64_t row = 0; row < step.num_rows; row++) {
    const int64_t seen = position_of(step, row) + 1;
    all += a.window > 0 ? smaller(seen, a.window) : seen;
  }
  return larger(MIN_PART_TOKENS, divide_up(all, 4 * static_cast<int64_t>(num_threads())));
}

// Fewer shared tokens than this are read again by everybody: merging costs, too.
constexpr int64_t MIN_SHARED_TOKENS = 64;

INLINE void plan_segments(Plan &plan, const Attention &a, const Step &step) {
  plan.num_segments = plan.num_found = 0;
  const int64_t part = part_length(a, step);
  int64_t row = 0;
  while (row < step.num_rows) {
    int64_t last = row + 1, common = position_of(step, row) / a.page_size;
    while (a.window == 0 && last < step.num_rows) {
      const int64_t now = common_pages(step, row, last, common, a.page_size);
      // Whoever joins saves `now` pages, and has everybody before it read the rest alone.
      if (now * a.page_size < MIN_SHARED_TOKENS || (common - now) * (last - row - 1) > now) break;
      common = now;
      last++;
    }
    const bool sharing = last > row + 1;
    const int64_t tokens = step.starts[last] - step.starts[row];
    const Range shared = sharing ? add_segments(plan, a, step, row, tokens, 0,
                                                common * a.page_size, false, true, part)
                                 : Range{0, 0};
    for (; row < last; row++) {
      const int64_t first = position_of(step, row), length = step.starts[row + 1] - step.starts[row];
      const int64_t seen = a.window > 0 ? larger(0, first - a.window + 1) : 0;
      const int64_t begin = sharing ? common * a.page_size : seen;
      plan.shared.at(row) = shared;
      plan.own.at(row) =
          add_segments(plan, a, step, row, length, begin, first + length, true, sharing, part);
    }
  }
  plan.found.at(plan.num_found) = 0;
}

// ── scores to weights, the same for all kernels ────────────────────────────────────────────────

// Rows of queries against one stretch of KV: running maximum, sum and weighted values of each.
struct Softmax {
  const Attention &a;
  float *most, *total;  // [rows]

  // Turn `scores` of keys first .. first + count - 1 into `weights`; keys outside [low, high) are
  // hidden. `count` is a multiple of WIDTH. Returns the factor for what was summed up before.
  template <class Weight>
  METHOD float weigh(float *scores, Weight *weights, int64_t row, int64_t first, int64_t count,
                     int64_t low, int64_t high) const {
    if (a.softcap > 0) cap(scores, count);
    if (first < low || first + count > high) hide(scores, first, count, low, high);
    const float scale = a.softcap > 0 ? 1.0f : a.scale, before = most[row];
    if (larger(first, low) >= smaller(first + count, high)) {  // weights are 0 here, not e^0
      for (int64_t i = 0; i < count; i += WIDTH) store(weights + i, vec{});
      return 1.0f;
    }
    vec best = load(scores);
    for (int64_t i = WIDTH; i < count; i += WIDTH) best = larger(best, load(scores + i));
    const float top = largest(best);
    const float now = before > top * scale ? before : top * scale;
    const float slope = scale * LOG2_E, offset = now * LOG2_E;
    vec sums{};
    for (int64_t i = 0; i < count; i += WIDTH) {
      const vec weight = power_of_2(load(scores + i) * slope - offset);
      store(weights + i, weight);
      sums += weight;
    }
    const float factor = before == now ? 1.0f : exponential(before - now);
    most[row] = now;
    total[row] = total[row] * factor + sum(sums);
    return factor;
  }

  METHOD void cap(float *scores, int64_t count) const {
    for (int64_t i = 0; i < count; i += WIDTH)
      store(scores + i,
            hyperbolic_tangent(load(scores + i) * (a.scale / a.softcap)) * a.softcap);
  }

  METHOD static void hide(float *scores, int64_t first, int64_t count, int64_t low, int64_t high) {
    const ivec before = splat_int(low - first), after = splat_int(high - first);
    ivec key = first_integers();
    for (int64_t i = 0; i < count; i += WIDTH, key += WIDTH)
      store(scores + i, (key < before) | (key >= after) ? splat(HIDDEN_SCORE) : load(scores + i));
  }
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
  if (a.sinks != nullptr) total += exponential(a.sinks[head] - most);
  const float factor = 1.0f / total;
  for (int64_t i = 0; i < dim; i++) put(out + i, values[i] * factor);
}

// What the segments of a row found for `token`, into `out` [heads, head_dim].
template <class Out>
INLINE void merge_token(const Plan &plan, const Attention &a, int64_t row, int64_t token, Out *out) {
  const int64_t dim = a.head_dim, size = a.heads * (dim + 2);
  const Range ranges[] = {plan.shared.data[row], plan.own.data[row]};
  const auto each = [&](int64_t head, const auto &body) {
    for (const Range &range : ranges)
      for (int64_t i = range.first; i < range.end; i++) {
        const Segment &s = plan.segments.data[i];
        body(plan.found.data + s.found + (token - s.token) * size + head * (dim + 2));
      }
  };
  for (int64_t head = 0; head < a.heads; head++) {
    float most = HIDDEN_SCORE, total = 0;
    each(head, [&](const float *x) { most = x[0] > most ? x[0] : most; });
    each(head, [&](float *x) {
      x[0] = exponential(x[0] - most);  // from now on the factor of this segment
      total += x[0] * x[1];
    });
    if (a.sinks != nullptr) total += exponential(a.sinks[head] - most);
    const float inverse = 1.0f / total;
    int64_t i = 0;
    for (; i + WIDTH <= dim; i += WIDTH) {
      vec values{};
      each(head, [&](const float *x) { values += load(x + 2 + i) * x[0]; });
      store(out + head * dim + i, values * inverse);
    }
    for (; i < dim; i++) {
      float value = 0;
      each(head, [&](const float *x) { value += x[2 + i] * x[0]; });
      put(out + head * dim + i, value * inverse);
    }
  }
}

// ── where KV lies ──────────────────────────────────────────────────────────────────────────────

// Offsets, in elements, of the rows of `count` tokens of a segment, for keys and values alike.
template <class Page>
INLINE void find_rows(const Attention &a, const Segment &s, int64_t first, int64_t count,
                      int64_t *offsets) {
  const int64_t row = a.kv_heads * head_size<Page>(a.head_dim);
  int64_t page = first / a.page_size, inside = first % a.page_size;
  for (int64_t t = 0; t < count; t++) {
    offsets[t] = (s.pages[page] * static_cast<int64_t>(a.page_size) + inside) * row;
    if (++inside == a.page_size) {
      inside = 0;
      page++;
    }
  }
}

INLINE int64_t first_seen(const Attention &a, const Segment &s, int64_t position) {
  return s.causal && a.window > 0 ? larger(s.kv_begin, position - a.window + 1) : s.kv_begin;
}
INLINE int64_t end_seen(const Segment &s, int64_t position) {
  return s.causal ? smaller(s.kv_end, position + 1) : s.kv_end;
}

// Ask for `n` elements before they are needed: pages lie anywhere, so the processor can't guess.
template <class T>
INLINE void fetch(const T *x, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T)))
    _mm_prefetch(reinterpret_cast<const char *>(x + i), _MM_HINT_T0);
}
