// What AMX's tile instructions do, in plain C++: included before the sources of an ISA variant
// (-include), it stands in for the intrinsics, so that the kernels for AMX run where no AMX is, and
// a sanitizer sees every byte they load. After Intel's Software Developer's Manual, volume 2.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tiles_of_amx {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  int rows, row_bytes;
  alignas(64) uint8_t bytes[16][64];

  template <class T>
  T get(int row, int i) const {
    T out;
    std::memcpy(&out, bytes[row] + i * sizeof(T), sizeof(T));
    return out;
  }
  template <class T>
  void set(int row, int i, T value) {
    std::memcpy(bytes[row] + i * sizeof(T), &value, sizeof(T));
  }
};

struct Unit {
  bool configured = false;
  Tile tiles[8] = {};
};
inline thread_local Unit unit;

[[noreturn]] inline void fault(const char* what) {
  std::fprintf(stderr, "AMX model: %s\n", what);
  std::abort();
}

inline Tile& tile(int i) {
  if (!unit.configured) fault("a tile is used before the unit is configured");
  return unit.tiles[i];
}

inline void load_config(const void* from) {
  Config config;
  std::memcpy(&config, from, sizeof(config));
  if (config.palette != 1) fault("only palette 1 is known");
  for (int i = 0; i < 8; ++i) {
    if (config.rows[i] > 16 || config.row_bytes[i] > 64) fault("a tile is too large");
    unit.tiles[i] = {config.rows[i], config.row_bytes[i], {}};
  }
  unit.configured = true;
}
inline void release() { unit = {}; }

inline void zero(int i) { std::memset(tile(i).bytes, 0, sizeof(Tile::bytes)); }
inline void load(int i, const void* from, int64_t stride) {
  Tile& t = tile(i);
  zero(i);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(t.bytes[r], static_cast<const uint8_t*>(from) + r * stride,
                static_cast<size_t>(t.row_bytes));
  }
}
inline void store(int i, void* to, int64_t stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, t.bytes[r],
                static_cast<size_t>(t.row_bytes));
  }
}

inline void check_shapes(const Tile& sum, const Tile& a, const Tile& b) {
  if (a.rows != sum.rows || b.row_bytes != sum.row_bytes || b.rows * 4 != a.row_bytes) {
    fault("the shapes of a product's tiles do not fit");
  }
}

// Unsigned bytes of a by signed ones of b, exactly, in 32 bits.
inline void dpbusd(int to, int left, int right) {
  Tile &sum = tile(to), &a = tile(left), &b = tile(right);
  check_shapes(sum, a, b);
  for (int m = 0; m < sum.rows; ++m) {
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < sum.row_bytes / 4; ++n) {
        int32_t s = sum.get<int32_t>(m, n);
        for (int j = 0; j < 4; ++j) {
          s += a.get<uint8_t>(m, 4 * k + j) * b.get<int8_t>(k, 4 * n + j);
        }
        sum.set(m, n, s);
      }
    }
  }
}

inline float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? 0 : value; }
inline float of_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return flushed(out);
}

// Pairs of bf16: the sums of first and of second products, by FMA, are added at the end. Subnormal
// numbers are zero.
inline void dpbf16ps(int to, int left, int right) {
  Tile &sum = tile(to), &a = tile(left), &b = tile(right);
  check_shapes(sum, a, b);
  for (int m = 0; m < sum.rows; ++m) {
    for (int n = 0; n < sum.row_bytes / 4; ++n) {
      float halves[2] = {};
      for (int k = 0; k < b.rows; ++k) {
        for (int j = 0; j < 2; ++j) {
          halves[j] = flushed(std::fma(of_bf16(a.get<uint16_t>(m, 2 * k + j)),
                                       of_bf16(b.get<uint16_t>(k, 2 * n + j)), halves[j]));
        }
      }
      sum.set(m, n, flushed(flushed(sum.get<float>(m, n)) + flushed(halves[0] + halves[1])));
    }
  }
}

}  // namespace tiles_of_amx

#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles_of_amx::load_config
#define _tile_release tiles_of_amx::release
#define _tile_zero tiles_of_amx::zero
#define _tile_loadd tiles_of_amx::load
#define _tile_stored tiles_of_amx::store
#define _tile_dpbusd tiles_of_amx::dpbusd
#define _tile_dpbf16ps tiles_of_amx::dpbf16ps
