// Rows of fp32 numbers in 8 or 16 bits, with the lengths that a bound on what is lost is made of.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "sae_kernels/simd.h"

namespace sae::SAE_ISA {

// A row v as scale * q, q integers of -127 to 127 or of -32767 to 32767. As unsigned bytes they are
// stored with 128 added.
struct NarrowRow {
  float scale;
  float narrow;  // at least |scale q|
  float error;   // at least |v - scale q|
  int32_t sum;   // of q

  float length() const { return narrow + error; }
};

// Lanes of two vectors of 32-bit numbers by their places in both.
template <int... kPlace, class V>
SAE_INLINE V shuffled(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kPlace...);
#else
  return __builtin_shuffle(a, b, Vec<int32_t>{kPlace...});
#endif
}

// Combines all lanes, in whatever order is fastest: halves, then halves of those.
template <class T, class Combine, int... kLane>
SAE_INLINE Vec<T> fold(Vec<T> v, const Combine& combine, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<T>;
  if constexpr (n > 8) v = combine(v, shuffled<(kLane ^ 8)...>(v, v));
  if constexpr (n > 4) v = combine(v, shuffled<(kLane ^ 4)...>(v, v));
  v = combine(v, shuffled<(kLane ^ 2)...>(v, v));
  return combine(v, shuffled<(kLane ^ 1)...>(v, v));
}
template <class T, class Combine>
SAE_INLINE T fold_lanes(Vec<T> v, const Combine& combine) {
  return fold<T>(v, combine, std::make_integer_sequence<int, kLanes<T>>{})[0];
}
template <class T>
SAE_INLINE T sum_of_lanes(Vec<T> v) {
  return fold_lanes<T>(v, [](Vec<T> a, Vec<T> b) SAE_INLINE_LAMBDA { return a + b; });
}

// Within these magnitudes of a row's largest element no product of two rows, or of what they are
// bounded by, leaves the normal range.
constexpr float kNarrowLeast = 0x1p-30f, kNarrowMost = 0x1p40f;
// Above the relative error of a sum of up to 2^15 squares in lanes, its root and what is derived.
constexpr float kNarrowUp = 1 + 0x1p-10f;
constexpr int64_t kNarrowWidth = int64_t{1} << 15;

// Elements of a row of q: whole vectors, and whole rows of AMX tiles, are read.
inline int64_t narrow_stride(int64_t D) {
  constexpr int64_t step = kVectorBytes == 64 ? 64 : 16;
  return (D + step - 1) / step * step;
}

SAE_INLINE float largest_magnitude(const float* row, int64_t D) {
  // As integers NaN is above infinity, so neither can get lost.
  Vec<int32_t> most{};
  for_each_vector<float>(D, [&](auto get, auto) SAE_INLINE_LAMBDA {
    const Vec<int32_t> bits = reinterpret_cast<Vec<int32_t>>(get(row)) & 0x7fffffff;
    most = bits > most ? bits : most;
  });
  const int32_t bits =
      fold_lanes<int32_t>(most, [](auto a, auto b) SAE_INLINE_LAMBDA { return a > b ? a : b; });
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// Writes q, numbers of at most `steps`, as whole vectors, and returns whether the row can be
// screened: not if an element is NaN, infinite or huge, or all of them are tiny and not all zero.
template <class Q>
SAE_INLINE bool narrow_row(const float* row, int64_t D, Q* q, NarrowRow& out,
                           float steps = std::numeric_limits<Q>::max()) {
  constexpr int32_t kAdded = std::is_unsigned<Q>::value ? 128 : 0;
  const float most = largest_magnitude(row, D);
  if (!(most <= kNarrowMost) || (most < kNarrowLeast && most != 0)) return false;
  out.scale = most == 0 ? 1.0f : most / steps;
  const Vec<float> inverse = splat(most == 0 ? 1.0f : steps / most), scale = splat(out.scale);
  const Vec<float> shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec<float> squares{}, lost{};
  Vec<int32_t> sum{};
  for (int64_t d = 0; d < D; d += kLanes<float>) {
    const int64_t n = D - d;
    const Vec<float> v = n >= kLanes<float> ? load(row + d) : load_tail(row + d, n);
    const Vec<float> shifted = v * inverse + shift;
    const Vec<float> rounded = shifted - shift;
    const Vec<float> rest = v - rounded * scale;
    squares += rounded * rounded;
    lost += rest * rest;
    const Vec<int32_t> number = reinterpret_cast<Vec<int32_t>>(shifted) - 0x4b400000;
    sum += number;
    const auto few =
        __builtin_convertvector(number + kAdded, typename VectorOf<Q, kLanes<float>>::type);
    std::memcpy(q + d, &few, sizeof(few));
  }
  out.narrow = out.scale * std::sqrt(sum_of_lanes<float>(squares)) * kNarrowUp;
  // The second part: without FMA the product is rounded before the difference.
  out.error = (std::sqrt(sum_of_lanes<float>(lost)) + 0x1p-23f * out.narrow) * kNarrowUp;
  out.sum = sum_of_lanes<int32_t>(sum);
  return true;
}

}  // namespace sae::SAE_ISA
