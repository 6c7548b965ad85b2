// Arithmetic of integers.
#include <algorithm>

#include "each.h"

namespace emulator {
namespace {

// By zero: all ones, as GPUs have it.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  return b == static_cast<T>(-1) && a < 0 ? static_cast<T>(u64{0} - static_cast<u64>(a)) : a / b;
}

template <class T>
T remainder(T a, T b) {
  return b == 0 || (b == static_cast<T>(-1) && a < 0) ? 0 : a % b;
}

u64 bit_field(u64 a, int from, int n, int bits, bool is_signed) {
  if (n == 0) return 0;
  if (!is_signed) return from > 63 ? 0 : cut(cut(a, bits) >> from, n);
  return static_cast<u64>(extend(static_cast<u64>(extend(a, bits) >> std::min(from, 63)), n));
}

u64 permuted(u64 a, u64 b, u64 selector) {
  const u64 both = cut(b, 32) << 32 | cut(a, 32);
  u64 made = 0;
  for (int i = 0; i < 4; ++i) {
    const u64 which = selector >> 4 * i & 15, byte = both >> 8 * (which & 7) & 255;
    made |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;  // or the sign, repeated
  }
  return made;
}

}  // namespace

void Step::integers() {
  const int bits = in_.type.bits;
  const bool is_signed = in_.type.kind == 's';
  const auto with = [&](auto function) {
    each([&](u64 a, u64 b, u64 c) { return cut(function(a, b, c), bits); });
  };
  // Both signed or both unsigned.
  const auto typed = [&](auto function) {
    if (is_signed) {
      with([&](u64 a, u64 b, u64) {
        return static_cast<u64>(function(extend(a, bits), extend(b, bits)));
      });
    } else {
      with([&](u64 a, u64 b, u64) {
        return static_cast<u64>(function(cut(a, bits), cut(b, bits)));
      });
    }
  };
  const auto at_least_zero = [&](auto a) { return in_.has("relu") && a < 0 ? decltype(a){0} : a; };
  const auto wide = [&](u64 a, u64 b) {
    return is_signed ? static_cast<u64>(extend(a, bits) * extend(b, bits))
                     : cut(a, bits) * cut(b, bits);
  };
  // clang-format off
  switch (in_.op) {
    case Op::kAdd: return with([](u64 a, u64 b, u64) { return a + b; });
    case Op::kSub: return with([](u64 a, u64 b, u64) { return a - b; });
    case Op::kMul: return with([](u64 a, u64 b, u64) { return a * b; });
    case Op::kMad: return with([](u64 a, u64 b, u64 c) { return a * b + c; });
    case Op::kMulWide: return each([&](u64 a, u64 b, u64) { return wide(a, b); });
    case Op::kMadWide: return each([&](u64 a, u64 b, u64 c) { return wide(a, b) + c; });
    case Op::kMulHigh:
      return with([&](u64 a, u64 b, u64) {
        using Wide = __int128;
        const Wide product = is_signed ? Wide{extend(a, bits)} * extend(b, bits)
                                       : static_cast<Wide>(static_cast<unsigned __int128>(
                                             cut(a, bits)) * cut(b, bits));
        return static_cast<u64>(product >> bits);
      });
    case Op::kDiv: return typed([](auto a, auto b) { return quotient(a, b); });
    case Op::kRem: return typed([](auto a, auto b) { return remainder(a, b); });
    case Op::kMin: return typed([&](auto a, auto b) { return at_least_zero(std::min(a, b)); });
    case Op::kMax: return typed([&](auto a, auto b) { return at_least_zero(std::max(a, b)); });
    case Op::kNeg: return with([](u64 a, u64, u64) { return u64{0} - a; });
    case Op::kAbs: return typed([](auto a, auto) { return a < 0 ? decltype(a)(0) - a : a; });
    case Op::kAnd: return with([](u64 a, u64 b, u64) { return a & b; });
    case Op::kOr: return with([](u64 a, u64 b, u64) { return a | b; });
    case Op::kXor: return with([](u64 a, u64 b, u64) { return a ^ b; });
    case Op::kNot: return with([](u64 a, u64, u64) { return ~a; });
    case Op::kShiftLeft:
      return with([&](u64 a, u64 b, u64) {
        return cut(b, 32) >= static_cast<u64>(bits) ? 0 : a << cut(b, 32);
      });
    case Op::kShiftRight:
      return with([&](u64 a, u64 b, u64) {
        const u64 by = std::min<u64>(cut(b, 32), static_cast<u64>(bits) - (is_signed ? 1 : 0));
        if (is_signed) return static_cast<u64>(extend(a, bits) >> by);
        return by >= static_cast<u64>(bits) ? 0 : cut(a, bits) >> by;
      });
    case Op::kBitField:
      return with([&](u64 a, u64 from, u64 n) {
        const int most = std::min(static_cast<int>(n & 255), bits);
        return bit_field(a, static_cast<int>(from & 255), most, bits, is_signed);
      });
    case Op::kPermute:
      if (in_.words.size() != 2) unknown();  // other modes than the plain one
      return with(permuted);
    case Op::kCountBits:
      return each([&](u64 a, u64, u64) {
        return static_cast<u64>(__builtin_popcountll(cut(a, bits)));
      });
    default: unknown();
  }
  // clang-format on
}

}  // namespace emulator
