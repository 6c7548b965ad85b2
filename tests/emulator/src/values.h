// Numbers as registers hold them: 64 bits of which an instruction's type uses the lower ones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) <= sizeof(From), "the rest would be anything");
  To to;
  std::memcpy(&to, &from, sizeof(to));  // little endian: the lower bytes
  return to;
}

inline u64 cut(u64 value, int bits) { return bits >= 64 ? value : value & ((u64{1} << bits) - 1); }

inline i64 extend(u64 value, int bits) {
  return bits >= 64 ? static_cast<i64>(value)
                    : static_cast<i64>(value << (64 - bits)) >> (64 - bits);
}

inline float f32(u64 value) { return bits_as<float>(value); }
inline double f64(u64 value) { return bits_as<double>(value); }
inline u64 of(float value) { return bits_as<u32>(value); }
inline u64 of(double value) { return bits_as<u64>(value); }

inline float from_bf16(u64 value) { return f32((value & 0xffff) << 16); }

inline u64 to_bf16(float value) {
  const u32 bits = bits_as<u32>(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float from_f16(u64 value) {
  const u32 sign = (value & 0x8000) << 16, exponent = value >> 10 & 31, fraction = value & 0x3ff;
  if (exponent == 31) return f32(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), f32(sign));
  return f32(sign | (exponent + 112) << 23 | fraction << 13);
}

inline u64 to_f16(float value) {
  const u64 sign = bits_as<u32>(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = -13;  // of subnormals, whose steps are 2^-24
  if (size >= 0x1p-14f) std::frexp(size, &exponent);
  // Rounds to even, and a fraction that becomes 2^11 carries into the exponent.
  const auto steps = static_cast<u64>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return sign | (size >= 0x1p-14f ? (static_cast<u64>(exponent + 13) << 10) + steps : steps);
}

}  // namespace emulator
