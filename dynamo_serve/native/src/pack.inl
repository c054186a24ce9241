// Weights into the layout that `product.inl` describes.

INLINE float weight_at(const void *rows, int32_t type, int64_t index) {
  return type == FLOAT32 ? static_cast<const float *>(rows)[index]
                         : widen(static_cast<const bf16 *>(rows)[index]);
}

INLINE void put_weight(float *to, float x) { *to = x; }
INLINE void put_weight(bf16 *to, float x) { *to = narrow(x); }
INLINE void put_weight(int8_t *to, float x) {
  const auto whole = static_cast<int32_t>(__builtin_rintf(x));
  *to = static_cast<int8_t>(LEVEL == 2 ? whole ^ 128 : whole);  // groups: 128 more, without a sign
}

// Where (input, column) of a panel lies.
INLINE int64_t place_in_panel(int64_t input, int64_t column, int32_t type) {
  if (!is_narrow(type)) return input * PANEL + column;
  const int64_t depth = depth_of(type), together = depth / 16;
  const int64_t group = input / together * together;
  if (LEVEL == 2) return group * PANEL + column * together + input % together;
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

// One output's row into its column of a panel. Numbers that lie side by side in the row and in the
// panel (two, or four) are found once.
template <class Row, class Packed>
INLINE void pack_column(Packed *panel, int64_t column, const Row *row, int64_t inputs, int32_t type,
                        float inverse) {
  const int64_t together = is_narrow(type) ? depth_of(type) / 16 : 1;
  int64_t i = 0;
  for (; i + together <= inputs; i += together) {
    Packed *to = panel + place_in_panel(i, column, type);
    for (int64_t j = 0; j < together; j++) put_weight(to + j, get(row + i + j) * inverse);
  }
  for (; i < inputs; i++)
    put_weight(panel + place_in_panel(i, column, type), get(row + i) * inverse);
}

template <class Packed>
INLINE void pack_row(void *panel, int64_t column, const void *rows, int32_t row_type, int64_t row,
                     int64_t inputs, int32_t type, float inverse) {
  auto *to = static_cast<Packed *>(panel);
  if (row_type == FLOAT32)
    pack_column(to, column, static_cast<const float *>(rows) + row * inputs, inputs, type, inverse);
  else
    pack_column(to, column, static_cast<const bf16 *>(rows) + row * inputs, inputs, type, inverse);
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
      if (type == FLOAT32)
        pack_row<float>(to, column, rows, row_type, row, inputs, type, inverse);
      else if (type == BFLOAT16)
        pack_row<bf16>(to, column, rows, row_type, row, inputs, type, inverse);
      else
        pack_row<int8_t>(to, column, rows, row_type, row, inputs, type, inverse);
    }
  });
}

size_t packed_bytes(int32_t outputs, int32_t inputs, int32_t type) {
  const Linear l{nullptr, nullptr, nullptr, outputs, inputs, type, 0};
  return static_cast<size_t>(panel_bytes(l) * divide_up(outputs, PANEL));
}
