// The tile product of select_topk on AMX, for bf16 operands.
//
// Latents are the A operand, loaded straight from the row-major W; tokens are the B operand, packed
// once a block into the pairs AMX wants. 2x2 tiles of 16x16 sums keep the unit busy. Where a row of
// W cannot be loaded in whole 32-element steps (D % 32, the last latents), the few rows concerned
// go through a zero-padded copy, so nothing outside W is ever read.
#pragma once

#include <algorithm>

#include "sae_kernels/simd.h"

#if defined(__AMX_BF16__)

namespace sae::SAE_ISA {

struct AmxProduct {
  using Element = bf16;
  using T = float;
  static constexpr int kGroup = 16;
  static constexpr int kTokenStep = 32;
  static constexpr int kLatents = 128;
  static constexpr int kDepth = 32;                  // elements of one tile row
  static constexpr int kTile = kGroup * kDepth;      // elements of one tile
  static constexpr int64_t kPackedBytes = 800 << 10;  // of L2, for the packed tokens of a block

  static int64_t steps(int64_t D) { return (D + kDepth - 1) / kDepth; }
  static int64_t max_tokens(int64_t D) {
    const int64_t fit = kPackedBytes / (2 * kDepth * steps(D)) / kTokenStep;
    return kTokenStep * std::min<int64_t>(std::max<int64_t>(fit, 1), 512 / kTokenStep);
  }
  static size_t packed_bytes(int64_t tokens, int64_t D) {
    return aligned(static_cast<size_t>(tokens * steps(D) * kDepth) * 2);
  }
  static size_t scratch_bytes(int64_t D) {
    return aligned(static_cast<size_t>(2 * kGroup * steps(D) * kDepth) * 2);
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
  static void pack(const bf16* x, int64_t tokens, int64_t padded, int64_t D, void* packed) {
    uint32_t* out = static_cast<uint32_t*>(packed);
    const int64_t pairs = steps(D) * kDepth / 2;
    for (int64_t first = 0; first < padded; first += kGroup, out += pairs * kGroup) {
      for (int64_t lane = 0; lane < kGroup; ++lane) {
        const int64_t token = first + lane;
        const bf16* row = x + token * D;
        for (int64_t pair = 0; pair < pairs; ++pair) {
          uint32_t low = 0, high = 0;
          if (token < tokens && 2 * pair < D) low = row[2 * pair].bits;
          if (token < tokens && 2 * pair + 1 < D) high = row[2 * pair + 1].bits;
          out[pair * kGroup + lane] = low | high << 16;
        }
      }
    }
  }

  // scores[group][kLatents][kGroup] = W tile times packed tokens.
  static void tile(const void* packed, int64_t padded, const bf16* W, int64_t latents, int64_t D,
                   float* scores, void* scratch) {
    const int64_t depth = steps(D) * kDepth;
    for (int64_t first = 0; first < latents; first += 2 * kGroup) {
      const int64_t rows = std::min<int64_t>(2 * kGroup, latents - first);
      const bf16* a = W + first * D;
      int64_t stride = D;
      if (rows < 2 * kGroup || depth != D) {
        a = pad(a, rows, D, depth, static_cast<bf16*>(scratch));
        stride = depth;
      }
      const bf16* b = static_cast<const bf16*>(packed);
      float* out = scores + first * kGroup;
      for (int64_t token = 0; token < padded; token += kTokenStep) {
        quad(a, stride, b, depth, out);
        b += kTokenStep * depth;
        out += 2 * kLatents * kGroup;
      }
    }
  }

 private:
  static const bf16* pad(const bf16* rows, int64_t n, int64_t D, int64_t depth, bf16* out) {
    std::memset(out, 0, static_cast<size_t>(2 * kGroup * depth) * sizeof(bf16));
    for (int64_t r = 0; r < n; ++r) {
      std::memcpy(out + r * depth, rows + r * D, static_cast<size_t>(D) * sizeof(bf16));
    }
    return out;
  }

  static void quad(const bf16* a, int64_t stride, const bf16* b, int64_t depth, float* out) {
    const int64_t a_bytes = stride * static_cast<int64_t>(sizeof(bf16));
    const bf16* a_low = a + kGroup * stride;
    const bf16* b_right = b + kGroup * depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d += kDepth) {
      _tile_loadd(4, a + d, a_bytes);
      _tile_loadd(6, b + d * kGroup, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a_low + d, a_bytes);
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
