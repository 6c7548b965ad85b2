// fp32 numbers cut to their upper halves, as row_update/halves.py and reference.py define it.
#pragma once

#include "sae_kernels/simd.h"

namespace sae::SAE_ISA {

// The bits of two numbers added up: of a high half and a low one, or of a number and what rounds it
// before its lower half is cut off.
template <class Bits>
SAE_INLINE Vec<float> added(Vec<float> value, Bits bits) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<uint32_t>>(value) +
                                      reinterpret_cast<Vec<uint32_t>>(bits));
}

// Makes all NaN one without a lower half: of another, a carry into the exponent or the sign, or a
// cut could make a number.
SAE_INLINE Vec<float> with_one_nan(Vec<float> value) {
  return value == value ? value : reinterpret_cast<Vec<float>>(splat(0x7fc00000u));
}

// An integer hash of low bias (github.com/skeeto/hash-prospector) of one number or of a vector.
template <class Bits>
SAE_INLINE Bits mixed(Bits x) {
  x ^= x >> 16;
  x = (x * 0x7feb352du) & 0xffffffffu;
  x ^= x >> 15;
  x = (x * 0x846ca68bu) & 0xffffffffu;
  return x ^ (x >> 16);
}

// 32 random bits for each column of a latent, a vector at a time: a function of step, latent and
// column alone, so of neither the ISA nor the threads.
class Noise {
 public:
  SAE_INLINE Noise(double step, int64_t latent, int64_t first_column)
      : key(splat(static_cast<uint32_t>(
            mixed(static_cast<uint64_t>(latent) ^ mixed(static_cast<uint64_t>(step)))))) {
    for (int i = 0; i < kLanes<uint32_t>; ++i) column[i] = static_cast<uint32_t>(first_column) + i;
  }

  SAE_INLINE Vec<uint32_t> next() {
    const Vec<uint32_t> bits = mixed(column ^ key);
    column += kLanes<uint32_t>;
    return bits;
  }

 private:
  Vec<uint32_t> key, column;
};

}  // namespace sae::SAE_ISA
