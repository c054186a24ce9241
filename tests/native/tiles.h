// Tiles in plain C++, in place of the instructions: so the kernels for AMX run on a processor that
// has none, and a sanitizer sees every row that a tile reads and writes. Semantics: Intel 64 and
// IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TDPBF16PS and
// TDPBSSD. Meant for `-include`, with DS_TILES_ARE_EMULATED defined (scripts/sanitize.py).
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  uint32_t rows = 0, row_bytes = 0;
  alignas(64) unsigned char bytes[16][64] = {};
};

inline thread_local Tile tiles[8];
inline thread_local bool are_configured = false;

inline void require(bool holds) {
  if (!holds) std::abort();  // the instruction would raise #UD
}

inline Tile &tile(int i) {
  require(are_configured && i >= 0 && i < 8 && tiles[i].rows && tiles[i].row_bytes);
  return tiles[i];
}

inline void configure(const void *from) {
  const auto *config = static_cast<const unsigned char *>(from);
  require(config[0] == 1 && config[1] == 0);
  for (int i = 0; i < 8; i++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * i, 2);
    require(row_bytes <= 64 && config[48 + i] <= 16);
    tiles[i] = Tile{};
    tiles[i].rows = config[48 + i];
    tiles[i].row_bytes = row_bytes;
  }
  are_configured = true;
}

inline void zero(int i) { std::memset(tile(i).bytes, 0, sizeof tiles[i].bytes); }

inline void load(int i, const void *from, int64_t stride) {
  zero(i);
  for (uint32_t row = 0; row < tiles[i].rows; row++)
    std::memcpy(tiles[i].bytes[row], static_cast<const char *>(from) + row * stride,
                tiles[i].row_bytes);
}

inline void store(int i, void *to, int64_t stride) {
  const Tile &from = tile(i);
  for (uint32_t row = 0; row < from.rows; row++)
    std::memcpy(static_cast<char *>(to) + row * stride, from.bytes[row], from.row_bytes);
}

inline float widened(const unsigned char *bfloat16) {
  uint16_t high;
  std::memcpy(&high, bfloat16, 2);
  const uint32_t bits = uint32_t{high} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// c[row][column] += a[row] · b[:, column], where b holds groups of `4 / sizeof(element)` inputs.
template <typename Sum, typename Multiply>
void multiply(int c, int a, int b, Multiply four_bytes) {
  Tile &sums = tile(c);
  const Tile &left = tile(a), &right = tile(b);
  require(c != a && c != b && a != b);
  require(sums.rows == left.rows && left.row_bytes / 4 == right.rows &&
          sums.row_bytes == right.row_bytes);
  for (uint32_t row = 0; row < sums.rows; row++)
    for (uint32_t column = 0; column < sums.row_bytes / 4; column++) {
      Sum sum;
      std::memcpy(&sum, sums.bytes[row] + 4 * column, 4);
      for (uint32_t group = 0; group < right.rows; group++)
        sum = four_bytes(sum, left.bytes[row] + 4 * group, right.bytes[group] + 4 * column);
      std::memcpy(sums.bytes[row] + 4 * column, &sum, 4);
    }
}

inline void bf16(int c, int a, int b) {
  multiply<float>(c, a, b, [](float sum, const unsigned char *x, const unsigned char *y) {
    sum = std::fmaf(widened(x), widened(y), sum);
    return std::fmaf(widened(x + 2), widened(y + 2), sum);
  });
}

inline void int8(int c, int a, int b) {
  multiply<int32_t>(c, a, b, [](int32_t sum, const unsigned char *x, const unsigned char *y) {
    for (int i = 0; i < 4; i++) sum += int32_t{int8_t(x[i])} * int8_t(y[i]);
    return sum;
  });
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(config) ::emulated::configure(config)
#define _tile_zero(i) ::emulated::zero(i)
#define _tile_loadd(i, from, stride) ::emulated::load(i, from, stride)
#define _tile_stream_loadd(i, from, stride) ::emulated::load(i, from, stride)
#define _tile_stored(i, to, stride) ::emulated::store(i, to, stride)
#define _tile_dpbf16ps(c, a, b) ::emulated::bf16(c, a, b)
#define _tile_dpbssd(c, a, b) ::emulated::int8(c, a, b)
