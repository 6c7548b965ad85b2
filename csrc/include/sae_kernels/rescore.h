// Scores of single pairs of a token and a latent, in the very order of sums of FmaProduct: one
// accumulator over d = 0 .. D-1. A vector's lanes are pairs.
#pragma once

#include <utility>

#include "sae_kernels/narrow.h"

namespace sae::SAE_ISA {

// Sixteen bytes of every fourth row, as many as fill a vector.
template <class E>
SAE_INLINE Vec<float> load_pieces(const E* const* rows, int64_t d) {
  const auto piece = [=](int i) SAE_INLINE_LAMBDA {
    return reinterpret_cast<const float*>(rows[4 * i] + d);
  };
#if defined(__AVX512F__)
  const __m512 low =
      _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(piece(0))), _mm_loadu_ps(piece(1)), 1);
  const __m512 three = _mm512_mask_broadcast_f32x4(low, 0x0f00, _mm_loadu_ps(piece(2)));
  return reinterpret_cast<Vec<float>>(
      _mm512_mask_broadcast_f32x4(three, 0xf000, _mm_loadu_ps(piece(3))));
#else
  Vec<float> out;
#if defined(__AVX2__)
  out = reinterpret_cast<Vec<float>>(_mm256_insertf128_ps(
      _mm256_castps128_ps256(_mm_loadu_ps(piece(0))), _mm_loadu_ps(piece(1)), 1));
#else
  std::memcpy(&out, piece(0), sizeof(out));
#endif
  return out;
#endif
}

// Of every four lanes the first, or the last, two of a and those of b: in turns, or as pairs.
template <bool kLast, int... kLane>
SAE_INLINE Vec<float> in_turns(Vec<float> a, Vec<float> b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<float>, first = kLast ? 2 : 0;
  return shuffled<(kLane / 4 * 4 + kLane % 4 / 2 + first + (kLane % 2 ? n : 0))...>(a, b);
}
template <bool kLast, int... kLane>
SAE_INLINE Vec<float> as_pairs(Vec<float> a, Vec<float> b, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<float>, first = kLast ? 2 : 0;
  return shuffled<(kLane / 4 * 4 + kLane % 2 + first + (kLane % 4 / 2 ? n : 0))...>(a, b);
}

template <class E>
constexpr int kColumns = 16 / static_cast<int>(sizeof(E));

// Columns d to d + kColumns<E> - 1 of as many rows as a vector has lanes. Four lanes are four rows:
// each four of them are transposed where they are, numbers of 16 bits as pairs.
template <class E>
SAE_INLINE void load_columns(const E* const (&rows)[kLanes<float>], int64_t d,
                             Vec<float> (&columns)[kColumns<E>]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
  Vec<float> a[4], out[4];
  SAE_UNROLL for (int i = 0; i < 4; ++i) a[i] = load_pieces(rows + i, d);
  const Vec<float> first_low = in_turns<false>(a[0], a[1], lanes);
  const Vec<float> last_low = in_turns<false>(a[2], a[3], lanes);
  const Vec<float> first_high = in_turns<true>(a[0], a[1], lanes);
  const Vec<float> last_high = in_turns<true>(a[2], a[3], lanes);
  out[0] = as_pairs<false>(first_low, last_low, lanes);
  out[1] = as_pairs<true>(first_low, last_low, lanes);
  out[2] = as_pairs<false>(first_high, last_high, lanes);
  out[3] = as_pairs<true>(first_high, last_high, lanes);
  SAE_UNROLL for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(E) == sizeof(float)) {
      columns[i] = out[i];
    } else {
      const auto pairs = reinterpret_cast<Vec<uint32_t>>(out[i]);
      columns[2 * i] = widen(rows[0], pairs & 0xffffu);
      columns[2 * i + 1] = widen(rows[0], pairs >> 16);
    }
  }
}

template <class E>
SAE_INLINE float widened(E value) {
  return load_tail(&value, 1)[0];
}

// The scores of as many pairs of rows as a vector has lanes.
template <class E>
__attribute__((noinline)) Vec<float> dot_pairs(const E* const (&x)[kLanes<float>],
                                               const E* const (&w)[kLanes<float>], int64_t D) {
  constexpr int n = kColumns<E>;
  Vec<float> sum{}, xs[n], ws[n];
  int64_t d = 0;
  for (; d + n <= D; d += n) {
    load_columns(x, d, xs);
    load_columns(w, d, ws);
    SAE_UNROLL for (int i = 0; i < n; ++i) sum += ws[i] * xs[i];
  }
  for (; d < D; ++d) {
    float xs_d[kLanes<float>], ws_d[kLanes<float>];
    for (int i = 0; i < kLanes<float>; ++i) xs_d[i] = widened(x[i][d]), ws_d[i] = widened(w[i][d]);
    sum += load_raw(ws_d) * load_raw(xs_d);
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
