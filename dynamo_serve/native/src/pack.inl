// Weights into the layout that `product.inl` describes.

INLINE float weight_at(const void *rows, int32_t type, int64_t index) {
  return type == FLOAT32 ? static_cast<const float *>(rows)[index]
                         : widen(static_cast<const bf16 *>(rows)[index]);
}

INLINE void put_weight(void *to, int32_t type, int64_t index, float x) {
  if (type == FLOAT32) static_cast<float *>(to)[index] = x;
  if (type == BFLOAT16) static_cast<bf16 *>(to)[index] = narrow(x);
  if (type == INT8) static_cast<int8_t *>(to)[index] = static_cast<int8_t>(__builtin_rintf(x));
}

// Where (input, column) of a panel lies.
INLINE int64_t place_in_panel(int64_t input, int64_t column, int32_t type) {
  if (!in_tiles(type)) return input * PANEL + column;
  const int64_t depth = depth_of(type), together = depth / 16;
  const int64_t step = input / depth, inner = input % depth;
  return step * PANEL * depth + column / 16 * 16 * depth + inner / together * 16 * together +
         column % 16 * together + inner % together;
}

// Symmetric int8: the largest weight of an output becomes 127.
INLINE float scale_of(const void *rows, int32_t type, int64_t row, int64_t inputs) {
  float most = 0;
  for (int64_t i = 0; i < inputs; i++) {
    const float x = weight_at(rows, type, row * inputs + i);
    most = x > most ? x : -x > most ? -x : most;
  }
  return most > 0 ? most / 127.0f : 1.0f;
}

// `scales` (INT8) gets one number for each column of each panel; `rows` are [outputs, inputs].
void pack(void *packed, float *scales, const void *rows, int32_t row_type, int32_t outputs,
          int32_t inputs, int32_t type, int32_t gated) {
  const Linear l{packed, nullptr, nullptr, outputs, inputs, type, gated};
  const int64_t bytes = panel_bytes(l);
  parallel(divide_up(outputs, PANEL), [&](int64_t panel) {
    char *to = static_cast<char *>(packed) + panel * bytes;
    __builtin_memset(to, 0, bytes);
    for (int64_t column = 0; column < PANEL; column++) {
      const int64_t row = source_row(panel, column, outputs, gated);
      float scale = 1.0f;
      if (row >= 0 && type == INT8) scale = scale_of(rows, row_type, row, inputs);
      if (type == INT8) scales[panel * PANEL + column] = scale;
      if (row < 0) continue;
      const float inverse = 1.0f / scale;
      for (int64_t i = 0; i < inputs; i++)
        put_weight(to, type, place_in_panel(i, column, type),
                   weight_at(rows, row_type, row * inputs + i) * inverse);
    }
  });
}

size_t packed_bytes(int32_t outputs, int32_t inputs, int32_t type) {
  const Linear l{nullptr, nullptr, nullptr, outputs, inputs, type, 0};
  return static_cast<size_t>(panel_bytes(l) * divide_up(outputs, PANEL));
}
