// The tile product of the encoders on AMX, for bf16 operands.
//
// Latents are the A operand, loaded straight from the row-major W; tokens are the B operand, packed
// once a block into the pairs AMX wants. 2x2 tiles of 16x16 sums keep the unit busy. Where rows of
// W cannot be loaded in whole tiles (D % 32, the last latents) they go through a zero-padded copy,
// so nothing outside W is ever read.
#pragma once

#include <algorithm>

#include "sae_kernels/rows.h"

#if defined(__AMX_BF16__)

namespace sae::SAE_ISA {

struct AmxProduct {
  using Element = bf16;
  using T = float;
  static constexpr int kGroup = 16;
  static constexpr int kTokenStep = 32;
  static constexpr int kLatents = 32;
  static constexpr int kDepth = 32;              // elements of one tile row
  static constexpr int kTile = kGroup * kDepth;  // elements of one tile
  static constexpr int64_t kL1Bytes = 48 << 10;
  static constexpr int64_t kPackedBytes = 1200 << 10;  // of L2, for the packed tokens of a block

  static int64_t steps(int64_t D) { return (D + kDepth - 1) / kDepth; }
  static int64_t max_tokens(int64_t D) {
    const int64_t fit = kPackedBytes / (2 * kDepth * steps(D)) / kTokenStep;
    return kTokenStep * std::min<int64_t>(std::max<int64_t>(fit, 1), 512 / kTokenStep);
  }
  // Of one step of packed tokens.
  static int64_t panel_bytes(int64_t D) { return kTokenStep * steps(D) * kDepth * 2; }
  static size_t scratch_bytes(int64_t D) {
    return aligned(static_cast<size_t>(kLatents * steps(D) * kDepth) * 2);
  }

  // Per thread and parallel region: other users of AMX (oneDNN) release the tiles when they finish.
  // The configuration is static because GCC 12 takes _tile_loadconfig to read 8 bytes only and
  // would drop stores to one on the stack.
  static void enter_thread() {
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static const Config config = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
  }
  static void leave_thread() { _tile_release(); }

  // packed[group][step][pair][token][2]: sixteen pairs of depth by sixteen tokens are one tile.
  static void pack(const bf16* x, const Rows& rows, int64_t tokens, int64_t padded, int64_t D,
                   void* packed) {
    uint32_t* out = static_cast<uint32_t*>(packed);
    const int64_t pairs = steps(D) * kDepth / 2;
    for (int64_t first = 0; first < padded; first += kGroup, out += pairs * kGroup) {
      const bf16* row[kGroup];
      uint32_t live = 0;
      for (int lane = 0; lane < kGroup; ++lane) {
        const bool is_there = first + lane < tokens;
        row[lane] = x + (is_there ? rows[first + lane] : 0) * D;
        live |= static_cast<uint32_t>(is_there) << lane;
      }
      pack_pairs(row, live, D / 2, out);
      std::memset(out + D / 2 * kGroup, 0, static_cast<size_t>((pairs - D / 2) * kGroup) * 4);
      for (int lane = 0; lane < kGroup && D % 2; ++lane) {
        if (live >> lane & 1) out[D / 2 * kGroup + lane] = row[lane][D - 1].bits;
      }
    }
  }

  // The rows of a tile of W as `tile` takes them: in place, or padded where they do not fit.
  static const bf16* rows(const bf16* W, int64_t latents, int64_t D, void* scratch) {
    const int64_t depth = steps(D) * kDepth;
    const int64_t padded = (latents + 2 * kGroup - 1) / (2 * kGroup) * (2 * kGroup);
    if (padded == latents && depth == D) return W;
    bf16* out = static_cast<bf16*>(scratch);
    std::memset(out, 0, static_cast<size_t>(padded * depth) * sizeof(bf16));
    for (int64_t f = 0; f < latents; ++f) {
      std::memcpy(out + f * depth, W + f * D, static_cast<size_t>(D) * sizeof(bf16));
    }
    return out;
  }

  // scores[2][kLatents][kGroup] = rows of W times one step of packed tokens. Meanwhile `fetch`
  // bytes from `ahead` on, the rows that come next, are brought near: waiting for them at their
  // first use would cost half as much as the products.
  static void tile(const void* panel, const bf16* rows, int64_t latents, int64_t D, float* scores,
                   const char* ahead, int64_t fetch) {
    const bf16* b = static_cast<const bf16*>(panel);
    const int64_t depth = steps(D) * kDepth;
    const int64_t quads = (latents + 2 * kGroup - 1) / (2 * kGroup);
    const int64_t per_step = (fetch / (quads * steps(D)) + 63) / 64 * 64;
    for (int64_t q = 0; q < quads; ++q) {
      const bf16* a = rows + q * 2 * kGroup * depth;
      float* out = scores + q * 2 * kGroup * kGroup;
      if (2 * kGroup * depth * 2 <= kL1Bytes) {
        quad<false>(a, b, depth, out, ahead, per_step);
      } else {
        quad<true>(a, b, depth, out, ahead, per_step);
      }
      ahead += per_step * steps(D);
    }
  }

 private:
  // One pair of each of sixteen rows after the other, zeros for rows that are not there.
  static void pack_pairs(const bf16* const (&row)[kGroup], uint32_t live, int64_t pairs,
                         uint32_t* out) {
    __m512i left = _mm512_loadu_si512(row), right = _mm512_loadu_si512(row + 8);
    const __m512i next = _mm512_set1_epi64(sizeof(uint32_t));
    const __mmask8 low = static_cast<__mmask8>(live), high = static_cast<__mmask8>(live >> 8);
    for (int64_t pair = 0; pair < pairs; ++pair, out += kGroup) {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i a = _mm512_mask_i64gather_epi32(zero, low, left, nullptr, 1);
      const __m256i b = _mm512_mask_i64gather_epi32(zero, high, right, nullptr, 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), b);
      left = _mm512_add_epi64(left, next);
      right = _mm512_add_epi64(right, next);
    }
  }

  // Rows of W that do not stay in L1 are 32 streams at once, more than the hardware follows.
  template <bool kFetchRows>
  static void quad(const bf16* a, const bf16* b, int64_t depth, float* out, const char* ahead,
                   int64_t per_step) {
    const int64_t stride = depth * static_cast<int64_t>(sizeof(bf16));
    const bf16* a_low = a + kGroup * depth;
    const bf16* b_right = b + kGroup * depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d += kDepth) {
      for (int64_t byte = 0; byte < per_step; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T1);
      ahead += per_step;
      if (kFetchRows) {
        for (int r = 0; r < 2 * kGroup; ++r) {
          _mm_prefetch(reinterpret_cast<const char*>(a + d + 2 * kDepth + r * depth), _MM_HINT_T0);
        }
      }
      _tile_loadd(4, a + d, stride);
      _tile_loadd(6, b + d * kGroup, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a_low + d, stride);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(7, b_right + d * kGroup, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + kGroup * kGroup, 64);
    _tile_stored(2, out + kLatents * kGroup, 64);
    _tile_stored(3, out + (kLatents + kGroup) * kGroup, 64);
  }
};

}  // namespace sae::SAE_ISA

#endif
