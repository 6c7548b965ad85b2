// Scores of single pairs of a token and a latent, in the very order of sums of FmaProduct<float>:
// one accumulator over d = 0 .. D-1. A vector's lanes are pairs.
#pragma once

#include <utility>

#include "sae_kernels/narrow.h"

namespace sae::SAE_ISA {

constexpr int kHalfLanes = kLanes<float> / 2;

// A vector of two rows' halves.
SAE_INLINE Vec<float> load_halves(const float* low, const float* high) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(
      _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1));
#else
  Vec<float> out;
  std::memcpy(&out, low, sizeof(out) / 2);
  std::memcpy(reinterpret_cast<float*>(&out) + kHalfLanes, high, sizeof(out) / 2);
  return out;
#endif
}

template <int kStep, int... kLane>
SAE_INLINE void exchange(Vec<float>& a, Vec<float>& b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<float>;
  const Vec<float> low = shuffled<((kLane & kStep) ? n + kLane - kStep : kLane)...>(a, b);
  b = shuffled<((kLane & kStep) ? n + kLane : kLane + kStep)...>(a, b);
  a = low;
}

// Transposes the two square halves of `columns`: halves of theirs change places, then halves of
// those, down to neighbours.
template <int kStep = kHalfLanes / 2>
SAE_INLINE void transpose_halves(Vec<float> (&columns)[kHalfLanes]) {
  if constexpr (kStep > 0) {
    SAE_UNROLL for (int i = 0; i < kHalfLanes; ++i) {
      if (i & kStep) continue;
      exchange<kStep>(columns[i], columns[i + kStep],
                      std::make_integer_sequence<int, kLanes<float>>{});
    }
    transpose_halves<kStep / 2>(columns);
  }
}

// Columns d to d + kHalfLanes - 1 of as many rows as a vector has lanes.
SAE_INLINE void load_columns(const float* const (&rows)[kLanes<float>], int64_t d,
                             Vec<float> (&columns)[kHalfLanes]) {
  SAE_UNROLL for (int i = 0; i < kHalfLanes; ++i) {
    columns[i] = load_halves(rows[i] + d, rows[i + kHalfLanes] + d);
  }
  transpose_halves(columns);
}

// The scores of as many pairs of rows as a vector has lanes.
__attribute__((noinline)) inline Vec<float> dot_pairs(const float* const (&x)[kLanes<float>],
                                                      const float* const (&w)[kLanes<float>],
                                                      int64_t D) {
  Vec<float> sum{}, xs[kHalfLanes], ws[kHalfLanes];
  int64_t d = 0;
  for (; d + kHalfLanes <= D; d += kHalfLanes) {
    load_columns(x, d, xs);
    load_columns(w, d, ws);
    SAE_UNROLL for (int i = 0; i < kHalfLanes; ++i) sum += ws[i] * xs[i];
  }
  for (; d < D; ++d) {
    Vec<float> xs_d, ws_d;
    for (int i = 0; i < kLanes<float>; ++i) xs_d[i] = x[i][d], ws_d[i] = w[i][d];
    sum += ws_d * xs_d;
  }
  return sum;
}

SAE_INLINE Vec<float> load_whole(const int16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtepi32_ps(
      _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtepi32_ps(
      _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
  typename VectorOf<int16_t, kLanes<float>>::type few;
  std::memcpy(&few, p, sizeof(few));
  return __builtin_convertvector(few, Vec<float>);
#endif
}

// Four pairs of a token in 16 bits, followed by zeros, and a latent, in whatever order is fastest.
__attribute__((noinline)) inline void dot_quick(const int16_t* const* x, const float* const* w,
                                                int64_t D, float (&out)[4]) {
  Vec<float> sum[4][2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes<float> <= D; d += 2 * kLanes<float>) {
    SAE_UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t at = d + half * kLanes<float>;
      SAE_UNROLL for (int i = 0; i < 4; ++i) {
        sum[i][half] += load_raw(w[i] + at) * load_whole(x[i] + at);
      }
    }
  }
  for (; d < D; d += kLanes<float>) {
    const int64_t n = std::min<int64_t>(kLanes<float>, D - d);
    for (int i = 0; i < 4; ++i) sum[i][0] += load_tail(w[i] + d, n) * load_whole(x[i] + d);
  }
  for (int i = 0; i < 4; ++i) out[i] = sum_of_lanes<float>(sum[i][0] + sum[i][1]);
}

}  // namespace sae::SAE_ISA
