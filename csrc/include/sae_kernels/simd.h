// Vectors of one ISA, on the vector extensions of GCC and Clang.
//
// Every source of csrc/cpu is compiled once per ISA with its own flags and its own namespace
// SAE_ISA: a wider ISA's inline function can then never be the one copy the linker keeps for a
// narrower one, which would be an illegal instruction on an older machine.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "sae_kernels/types.h"

#ifndef SAE_ISA
#define SAE_ISA portable
#endif

#define SAE_INLINE inline __attribute__((always_inline))
#define SAE_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define SAE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SAE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace sae::SAE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using Vec = typename VectorOf<T, kLanes<T>>::type;

template <class T>
SAE_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // unlike an addition, exact for -0 and so folded to a broadcast
}

template <class T>
SAE_INLINE Vec<T> load_raw(const T* p) {
  Vec<T> out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

// Every kStride-th number.
template <int kStride, class T>
SAE_INLINE Vec<T> load_strided(const T* p) {
  Vec<T> out;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i places =
        _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                           _mm512_set1_epi32(kStride));
    return reinterpret_cast<Vec<T>>(_mm512_i32gather_ps(places, p, 4));
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i) out[i] = p[i * kStride];
  return out;
}

SAE_INLINE Vec<float> load(const float* p) { return load_raw(p); }
SAE_INLINE Vec<double> load(const double* p) { return load_raw(p); }

// Between 16 and 32 bits GCC 12 converts by halves; the instructions for it are named where it
// counts.
SAE_INLINE Vec<uint32_t> load_half_bits(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<uint32_t>>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<uint32_t>>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  typename VectorOf<uint16_t, kLanes<uint32_t>>::type narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, Vec<uint32_t>);
#endif
}

SAE_INLINE Vec<float> widen(const bf16*, Vec<uint32_t> bits) {
  return reinterpret_cast<Vec<float>>(bits << 16);
}

// Half to float without a table: shifting the fields over and multiplying by 2^112 rebiases the
// exponent and renormalises subnormals at once; infinities and NaN need their exponent filled.
SAE_INLINE Vec<float> widen(const f16*, Vec<uint32_t> half) {
  const Vec<uint32_t> magnitude = (half & 0x7fffu) << 13;
  const Vec<uint32_t> sign = (half & 0x8000u) << 16;
  const Vec<float> scaled = reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f;
  const Vec<uint32_t> special =
      reinterpret_cast<Vec<uint32_t>>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<uint32_t>>(scaled) | special | sign);
}

SAE_INLINE Vec<float> load(const bf16* p) { return widen(p, load_half_bits(p)); }
SAE_INLINE Vec<float> load(const f16* p) { return widen(p, load_half_bits(p)); }

SAE_INLINE void store(float* p, Vec<float> value) { std::memcpy(p, &value, sizeof(value)); }
SAE_INLINE void store(double* p, Vec<double> value) { std::memcpy(p, &value, sizeof(value)); }
SAE_INLINE void store(int32_t* p, Vec<int32_t> value) { std::memcpy(p, &value, sizeof(value)); }

SAE_INLINE void store_half_bits(void* p, Vec<uint32_t> bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(bits);
  const __m256i packed = _mm256_packus_epi32(wide, wide);  // within each half of the vector
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const auto narrow =
      __builtin_convertvector(bits, typename VectorOf<uint16_t, kLanes<uint32_t>>::type);
  std::memcpy(p, &narrow, sizeof(narrow));
#endif
}

// Round to nearest even; a NaN is kept a NaN, which the rounding carry could turn into infinity.
SAE_INLINE void store(bf16* p, Vec<float> value) {
  const Vec<uint32_t> u = reinterpret_cast<Vec<uint32_t>>(value);
  const Vec<uint32_t> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Vec<uint32_t> quiet = (u >> 16) | 0x40u;
  const Vec<uint32_t> is_nan = reinterpret_cast<Vec<uint32_t>>(value != value);
  store_half_bits(p, (is_nan & quiet) | (~is_nan & rounded));
}

// Round to nearest even: by the carry of an addition where the result is a normal half, by the FPU
// (adding 0.5 aligns the bits) where it is subnormal.
SAE_INLINE void store(f16* p, Vec<float> value) {
  const Vec<uint32_t> u = reinterpret_cast<Vec<uint32_t>>(value);
  const Vec<uint32_t> sign = (u >> 16) & 0x8000u;
  const Vec<uint32_t> magnitude = u & 0x7fffffffu;
  const Vec<uint32_t> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Vec<uint32_t> subnormal =
      reinterpret_cast<Vec<uint32_t>>(reinterpret_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const auto pick = [](auto mask, Vec<uint32_t> a, Vec<uint32_t> b) SAE_INLINE_LAMBDA {
    const Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(mask);
    return (bits & a) | (~bits & b);
  };
  Vec<uint32_t> half = pick(magnitude < 0x38800000u, subnormal, normal);
  half = pick(magnitude >= 0x477ff000u, splat<uint32_t>(0x7c00u), half);
  half = pick(magnitude > 0x7f800000u, splat<uint32_t>(0x7e00u), half);
  store_half_bits(p, half | sign);
}

// A high half is a bf16 number that is rounded by whoever stores it: what is below is cut off.
SAE_INLINE Vec<float> load(const high_half* p) {
  return reinterpret_cast<Vec<float>>(load_half_bits(p) << 16);
}
SAE_INLINE void store(high_half* p, Vec<float> value) {
  store_half_bits(p, reinterpret_cast<Vec<uint32_t>>(value) >> 16);
}

// A low half is signed and is read as the bits to add to its high half's: no number by itself.
SAE_INLINE Vec<float> load(const low_half* p) {
  return reinterpret_cast<Vec<float>>((load_half_bits(p) ^ 0x8000u) - 0x8000u);
}
SAE_INLINE void store(low_half* p, Vec<float> value) {
  store_half_bits(p, reinterpret_cast<Vec<uint32_t>>(value) & 0xffffu);
}

// Rows whose width is no multiple of the vector end in a zero-padded copy.
template <class E>
SAE_INLINE Vec<Acc<E>> load_tail(const E* p, int64_t n) {
  E padded[kLanes<Acc<E>>] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(E));
  return load(padded);
}
template <class E>
SAE_INLINE void store_tail(E* p, Vec<Acc<E>> value, int64_t n) {
  E padded[kLanes<Acc<E>>];
  store(padded, value);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(E));
}

// Calls body(load, store, position) over a row: whole vectors, then the tail. `load` and `store`
// take a row's start and know how much of it is there.
template <class T, class Body>
SAE_INLINE void for_each_vector(int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) {
    body([i](const auto* row) SAE_INLINE_LAMBDA { return load(row + i); },
         [i](auto* row, Vec<T> value) SAE_INLINE_LAMBDA { store(row + i, value); });
  }
  if (const int64_t n = width - i; n > 0) {
    body([i, n](const auto* row) SAE_INLINE_LAMBDA { return load_tail(row + i, n); },
         [i, n](auto* row, Vec<T> value) SAE_INLINE_LAMBDA { store_tail(row + i, value, n); });
  }
}

// A fixed tree, so that a sum does not depend on who adds.
template <class T>
SAE_INLINE T horizontal_sum(Vec<T> value) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &value, sizeof(value));
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class T>
SAE_INLINE Vec<T> square_root(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return reinterpret_cast<Vec<T>>(_mm512_sqrt_ps((__m512)x));
  if constexpr (sizeof(T) == 8) return reinterpret_cast<Vec<T>>(_mm512_sqrt_pd((__m512d)x));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return reinterpret_cast<Vec<T>>(_mm256_sqrt_ps((__m256)x));
  if constexpr (sizeof(T) == 8) return reinterpret_cast<Vec<T>>(_mm256_sqrt_pd((__m256d)x));
#else
  for (int i = 0; i < kLanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Of two NaN an operation keeps the payload of one, and which is left to the compiler.
template <class T>
SAE_INLINE T with_one_nan(T value) {
  return value != value ? std::numeric_limits<T>::quiet_NaN() : value;
}

// Bit i: lane i is NOT below the threshold (kStrict: nor at it). Written so that NaN survives.
template <class T, bool kStrict = false>
SAE_INLINE uint32_t survivors(Vec<T> key, Vec<T> threshold) {
#if defined(__AVX2__)
  constexpr int kTest = kStrict ? _CMP_NLE_UQ : _CMP_NLT_UQ;
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(key), reinterpret_cast<__m512>(threshold),
                              kTest);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(key), reinterpret_cast<__m512d>(threshold),
                              kTest);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return static_cast<uint32_t>(_mm256_movemask_ps(
        _mm256_cmp_ps(reinterpret_cast<__m256>(key), reinterpret_cast<__m256>(threshold), kTest)));
  } else {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(
        reinterpret_cast<__m256d>(key), reinterpret_cast<__m256d>(threshold), kTest)));
  }
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    const bool below = kStrict ? key[i] <= threshold[i] : key[i] < threshold[i];
    mask |= static_cast<uint32_t>(!below) << i;
  }
  return mask;
#endif
}

}  // namespace sae::SAE_ISA
