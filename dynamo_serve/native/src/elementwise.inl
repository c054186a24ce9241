// Embedding, RMS norm, rotary embedding with the page write: what stands between the products.

template <class T>
INLINE float sum_of_squares(const T *x, int64_t n) {
  vec squares{};
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    const vec part = load(x + i);
    squares += part * part;
  }
  float total = sum(squares);
  for (; i < n; i++) total += get(x + i) * get(x + i);
  return total;
}

// y = x / rms(x) * weight (Zhang and Sennrich 2019); `residual` adds to y instead of replacing it.
template <class In, class Out>
INLINE void rms_norm(const In *x, const float *weight, float eps, int64_t n, Out *y,
                     bool residual = false) {
  const float factor = 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    const vec result = load(x + i) * factor * load(weight + i);
    store(y + i, residual ? load(y + i) + result : result);
  }
  for (; i < n; i++) {
    const float result = get(x + i) * factor * weight[i];
    put(y + i, residual ? get(y + i) + result : result);
  }
}

// Rotate the halves of one head against each other, as Llama does (Su et al. 2021).
template <class T>
INLINE void rotate(T *x, const float *cos, const float *sin, int64_t half) {
  int64_t i = 0;
  for (; i + WIDTH <= half; i += WIDTH) {
    const vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = get(x + i), b = get(x + half + i);
    put(x + i, a * cos[i] - b * sin[i]);
    put(x + half + i, b * cos[i] + a * sin[i]);
  }
}

template <class T>
INLINE void embed(const Model &model, const Step &step, float *hidden, int64_t stride) {
  const auto *table = static_cast<const T *>(model.embedding);
  const int64_t n = model.hidden;
  parallel(step.num_tokens, [&](int64_t token) {
    const T *row = table + step.token_ids[token] * n;
    float *out = hidden + token * stride;
    for (int64_t i = 0; i < n; i++) out[i] = get(row + i) * model.embedding_scale;
  });
}

// Norm and rotate the queries in place; norm and rotate the keys and write them and the values to
// their pages. `qkv` has `stride` elements from token to token.
template <class T, class Page>
INLINE void rotate_and_write(const Model &model, const Layer &layer, const Step &step, T *qkv,
                             int64_t stride) {
  const Attention &a = layer.attention;
  const int64_t dim = a.head_dim, half = model.rotary_dim / 2;
  const int64_t row = a.kv_heads * head_size<Page>(dim);
  constexpr int64_t BLOCK = 8;
  parallel(divide_up(step.num_tokens, BLOCK), [&](int64_t block) {
    const int64_t end = smaller((block + 1) * BLOCK, step.num_tokens);
    for (int64_t token = block * BLOCK; token < end; token++) {
      T *x = qkv + token * stride;
      const float *cos = layer.cos + step.positions[token] * half;
      const float *sin = layer.sin + step.positions[token] * half;
      for (int64_t head = 0; head < a.heads + a.kv_heads; head++) {
        const float *norm = head < a.heads ? layer.query_norm : layer.key_norm;
        T *part = x + head * dim;
        if (norm != nullptr) rms_norm(part, norm, model.norm_eps, dim, part);
        if (half > 0) rotate(part, cos, sin, half);
      }
      const T *key = x + a.heads * dim, *value = key + a.kv_heads * dim;
      Page *keys = static_cast<Page *>(a.keys) + step.slots[token] * row;
      Page *values = static_cast<Page *>(a.values) + step.slots[token] * row;
      for (int64_t head = 0; head < a.kv_heads; head++) {
        write_head(key + head * dim, keys + head * head_size<Page>(dim), dim);
        write_head(value + head * dim, values + head * head_size<Page>(dim), dim);
      }
    }
  });
}
