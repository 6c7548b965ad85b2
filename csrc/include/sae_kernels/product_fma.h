// The tile product of the encoders on vector units, for every operand type.
//
// Latents are broadcast, tokens are lanes: W is read as it lies (a latent is a contiguous row) and
// only the few tokens of a block are repacked, so there is no second layout of W to keep in step
// with the optimizer. Each element is one accumulator over d = 0 .. D-1 whatever the block shape,
// so a row's result does not depend on the batch around it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sae_kernels/rows.h"

namespace sae::SAE_ISA {

template <class E>
struct FmaProduct {
  using Element = E;
  using T = Acc<E>;
  static constexpr int kGroup = kLanes<T>;                     // tokens of one vector
  static constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;  // vectors of one panel
  static constexpr int kRows = kVectorBytes == 16 ? 4 : 6;     // latents of one micro tile
  static constexpr int kLatents = 48;                          // latents of one tile
  static constexpr int kTokenStep = kGroup * kVectors;
  static constexpr int64_t kPackedBytes = 1 << 20;  // of L2, for the packed tokens of a block
  static constexpr bool kConverts = !std::is_same<E, T>::value;

  static int64_t max_tokens(int64_t D) {
    const int64_t fit = kPackedBytes / (D * static_cast<int64_t>(sizeof(T))) / kTokenStep;
    return kTokenStep * std::min<int64_t>(std::max<int64_t>(fit, 1), 256 / kTokenStep);
  }
  // Of one step of packed tokens.
  static int64_t panel_bytes(int64_t D) { return kTokenStep * D * static_cast<int64_t>(sizeof(T)); }
  static size_t scratch_bytes(int64_t D) {
    return kConverts ? aligned(static_cast<size_t>(kLatents * D) * sizeof(T)) : 0;
  }
  static void enter_thread() {}
  static void leave_thread() {}

  // Panel p holds its tokens d-major: packed[p][d][kTokenStep]; missing tokens are zero.
  static void pack(const E* x, const Rows& rows, int64_t tokens, int64_t padded, int64_t D,
                   void* packed) {
    T* out = static_cast<T*>(packed);
    for (int64_t first = 0; first < padded; first += kTokenStep, out += D * kTokenStep) {
      for (int64_t lane = 0; lane < kTokenStep; ++lane) {
        const int64_t token = first + lane;
        if (token >= tokens) {
          for (int64_t d = 0; d < D; ++d) out[d * kTokenStep + lane] = T{0};
          continue;
        }
        const E* row = x + rows[token] * D;
        for (int64_t d = 0; d < D; d += kGroup) {
          T lanes[kGroup];
          const int64_t n = std::min<int64_t>(kGroup, D - d);
          store(lanes, n == kGroup ? load(row + d) : load_tail(row + d, n));
          for (int64_t i = 0; i < n; ++i) out[(d + i) * kTokenStep + lane] = lanes[i];
        }
      }
    }
  }

  // The rows of a tile of W in the accumulator type: in place, or widened.
  static const T* rows(const E* W, int64_t latents, int64_t D, void* scratch) {
    if constexpr (!kConverts) {
      return W;
    } else {
      T* out = static_cast<T*>(scratch);
      for (int64_t f = 0; f < latents; ++f) {
        for_each_vector<T>(
            D, [&](auto get, auto put) SAE_INLINE_LAMBDA { put(out + f * D, get(W + f * D)); });
      }
      return out;
    }
  }

  // scores[kVectors][kLatents][kGroup] = rows of W times one step of packed tokens. Enough is
  // computed per row that fetching ahead is left to the hardware.
  static void tile(const void* panel, const T* rows, int64_t latents, int64_t D, T* scores,
                   const char*, int64_t) {
    for (int64_t first = 0; first < latents; first += kRows) {
      const T* row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = rows + std::min(first + r, latents - 1) * D;
      micro(static_cast<const T*>(panel), row, D, scores + first * kGroup);
    }
  }

 private:
  static_assert(kLatents % kRows == 0);

  static void micro(const T* panel, const T* const (&row)[kRows], int64_t D, T* out) {
    Vec<T> sum[kRows][kVectors] = {};
    for (int64_t d = 0; d < D; ++d) {
      Vec<T> x[kVectors];
      SAE_UNROLL for (int v = 0; v < kVectors; ++v) x[v] = load_raw(panel + v * kGroup);
      panel += kTokenStep;
      SAE_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec<T> w = splat(row[r][d]);
        SAE_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] += w * x[v];
      }
    }
    SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
      SAE_UNROLL for (int r = 0; r < kRows; ++r) {
        store(out + (v * kLatents + r) * kGroup, sum[r][v]);
      }
    }
  }
};

}  // namespace sae::SAE_ISA
