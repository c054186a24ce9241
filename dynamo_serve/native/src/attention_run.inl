// Which kernel takes which part of a step, and the merge at the end.

constexpr int64_t MANY_ROWS = 10;   // queries per KV head from which on packing KV pays
constexpr int64_t PIECE_ROWS = 128; // that one task takes then

template <class In, class Page>
INLINE bool has_many(const Attention &a, const Segment &s) {
  return LEVEL >= 2 && sizeof(In) == 2 && sizeof(Page) <= 2 && a.head_dim % 32 == 0 &&
         s.tokens * (a.heads / a.kv_heads) >= MANY_ROWS;
}

template <class In, class Page>
INLINE void cut_pieces(Plan &plan, const Attention &a) {
  plan.num_pieces = 0;
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t i = 0; i < plan.num_segments; i++) {
    const Segment &s = plan.segments.data[i];
    const int64_t rows = has_many<In, Page>(a, s) ? PIECE_ROWS : FEW_ROWS;
    const int64_t tokens = larger(1, rows / group);
    for (int64_t token = 0; token < s.tokens; token += tokens)
      plan.pieces.at(plan.num_pieces++) =
          Piece{static_cast<int32_t>(i), static_cast<int32_t>(s.token + token),
                static_cast<int32_t>(smaller(tokens, s.tokens - token))};
  }
}

template <class In>
INLINE void merge_rows(const Plan &plan, const Attention &a, const Step &step, In *out,
                       int64_t stride) {
  parallel(step.num_rows, [&](int64_t row) {
    if (plan.segments.data[plan.own.data[row].first].found < 0) return;
    for (int64_t token = step.starts[row]; token < step.starts[row + 1]; token++)
      merge_token(plan, a, row, token, out + token * stride);
  });
}

// Attend all tokens of the step, whose KV is in the pages already. Shapes [T, heads, head_dim].
template <class In, class Page>
INLINE void attend(const Attention &a, const Step &step, Plan &plan, const In *queries,
                   int64_t query_stride, In *out, int64_t out_stride) {
  cut_pieces<In, Page>(plan, a);
  if (plan.num_pieces == 0) return;
  // Whole rows of KV are read from end to end where there are enough pieces for all threads.
  const int64_t wanted = divide_up(4 * static_cast<int64_t>(num_threads()), plan.num_pieces);
  const int64_t per_task = larger(1, a.kv_heads / wanted);
  const int64_t cuts = divide_up(a.kv_heads, per_task);
  parallel(plan.num_pieces * cuts, [&](int64_t task) {
    const Piece &piece = plan.pieces.data[task / cuts];
    const int64_t first = task % cuts * per_task;
    const int64_t last = smaller(a.kv_heads, first + per_task);
#if LEVEL >= 2
    if constexpr (sizeof(In) == 2 && sizeof(Page) <= 2)
      if (has_many<In, Page>(a, plan.segments.data[piece.segment])) {
        for (int64_t head = first; head < last; head++)
          attend_many<Page>(a, step, plan, piece, head, queries, query_stride, out,
                            out_stride);
        return;
      }
#endif
    attend_few<In, Page>(a, step, plan, piece, first, last, queries, query_stride, out, out_stride);
  });
  if (plan.num_found > 0) merge_rows(plan, a, step, out, out_stride);
}
