// The narrow product that screens latents: tokens in unsigned, latents in signed bytes, exact sums
// in 32 bits, turned into bounds that no score of the fp32 product exceeds (docs/numerics.md).
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#include "sae_kernels/narrow.h"
#include "sae_kernels/product_fma.h"

namespace sae::SAE_ISA {

struct Int8Product {
  using Wide = FmaProduct<float>;
  static constexpr int kGroup = Wide::kGroup, kVectors = Wide::kVectors, kRows = Wide::kRows;
  static constexpr int kLatents = Wide::kLatents, kTokenStep = Wide::kTokenStep;

  // Whether this machine has an instruction for it; the portable variant models what that does.
  static bool is_fast() {
#if defined(__AVX512F__) || defined(__AVX2__)
    unsigned a = 0, b = 0, c = 0, d = 0;
#if defined(__AVX512F__)
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);  // AVX-512 VNNI
#else
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);  // AVX-VNNI
#endif
#else
    return false;
#endif
  }
  static bool runs() { return kVectorBytes == 16 || is_fast(); }

  static int64_t quads(int64_t D) { return (D + 3) / 4; }
  static constexpr int kApart = 4;  // columns at most that are multiplied apart, in fp32
  // One step of tokens: [quad][token][4 bytes], then what Token holds and the columns apart,
  // [kTokenStep] each.
  static int64_t panel_bytes(int64_t D) {
    return kTokenStep * (quads(D) * 4 + (kFields + kApart) * static_cast<int64_t>(sizeof(float)));
  }
  enum Token { kScale, kLength, kError, kWhole, kFields };
  static const float* fields(const void* panel, int64_t D) {
    return reinterpret_cast<const float*>(static_cast<const char*>(panel) +
                                          kTokenStep * quads(D) * 4);
  }

  // A latent as the product and its bounds take it.
  struct Latent {
    const int8_t* q;
    int32_t start;  // of a sum, for the 128 that is added to the bytes of tokens
    float scale, narrow, error, rounding;
    float apart[kApart];
  };

  // Puts a token into its place in the packed panels and returns where its columns apart go, one
  // every kTokenStep. `whole` is its length with them.
  static float* pack(const int8_t* q, const NarrowRow& row, float whole, int64_t token, int64_t D,
                     void* packed) {
    char* panel = static_cast<char*>(packed) + token / kTokenStep * panel_bytes(D);
    const int64_t lane = token % kTokenStep;
    uint32_t* quad = reinterpret_cast<uint32_t*>(panel) + lane;
    for (int64_t i = 0; i < quads(D); ++i, quad += kTokenStep) {
      uint32_t bytes;
      std::memcpy(&bytes, q + 4 * i, sizeof(bytes));
      *quad = bytes ^ 0x80808080u;  // adds 128 to each
    }
    float* field = const_cast<float*>(fields(panel, D)) + lane;
    field[kScale * kTokenStep] = row.scale;
    field[kLength * kTokenStep] = row.length();
    field[kError * kTokenStep] = row.error;
    field[kWhole * kTokenStep] = whole;
    return field + kFields * kTokenStep;
  }

  // bounds[kVectors][kLatents][kGroup]: none is below the score of its latent and token. Meanwhile
  // `fetch` bytes from `ahead` on are brought near.
  __attribute__((noinline)) static void tile(const void* panel, const Latent* latents, int64_t n,
                                             int64_t D, int apart, float* bounds, const char* ahead,
                                             int64_t fetch) {
    const int64_t per_quad = fetch * kRows / (n * quads(D)) + 1;
    for (int64_t first = 0; first < n; first += kRows) {
      const Latent* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = latents + std::min(first + r, n - 1);
      micro(static_cast<const int32_t*>(panel), rows, D, apart, bounds + first * kGroup, ahead,
            per_quad);
      ahead += per_quad * quads(D);
    }
  }

 private:
  // Adds to each sum four products of bytes, unsigned ones of x and signed ones of w.
  SAE_INLINE static Vec<int32_t> plus_products(Vec<int32_t> sum, Vec<int32_t> x, Vec<int32_t> w) {
    // Named to the assembler: the variant's own flags are those of machines that may not have them.
#if defined(__AVX512F__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#elif defined(__AVX2__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
#else
    uint8_t a[sizeof(x)];
    int8_t b[sizeof(w)];
    std::memcpy(a, &x, sizeof(x));
    std::memcpy(b, &w, sizeof(w));
    for (int i = 0; i < static_cast<int>(sizeof(a)); ++i) sum[i / 4] += a[i] * b[i];
#endif
    return sum;
  }

  static void micro(const int32_t* panel, const Latent* const (&rows)[kRows], int64_t D, int apart,
                    float* out, const char* ahead, int64_t per_quad) {
    const float* field = fields(panel, D);
    Vec<int32_t> sum[kRows][kVectors];
    SAE_UNROLL for (int r = 0; r < kRows; ++r) {
      SAE_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = splat(rows[r]->start);
    }
    const int8_t* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = rows[r]->q;
    const int64_t n = quads(D);
    for (int64_t quad = 0; quad < n; ++quad, panel += kTokenStep) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += per_quad;
      Vec<int32_t> x[kVectors];
      SAE_UNROLL for (int v = 0; v < kVectors; ++v) x[v] = load_raw(panel + v * kGroup);
      SAE_UNROLL for (int r = 0; r < kRows; ++r) {
        int32_t bytes;
        std::memcpy(&bytes, q[r] + 4 * quad, sizeof(bytes));
        const Vec<int32_t> w = splat(bytes);
        SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = plus_products(sum[r][v], x[v], w);
        }
      }
    }
    Vec<float> most[kRows][kVectors];
    SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
      const auto of_tokens = [&](int which) SAE_INLINE_LAMBDA {
        return load_raw(field + which * kTokenStep + v * kGroup);
      };
      const Vec<float> scale = of_tokens(kScale), length = of_tokens(kLength);
      const Vec<float> error = of_tokens(kError), whole = of_tokens(kWhole);
      SAE_UNROLL for (int r = 0; r < kRows; ++r) {
        const Latent& row = *rows[r];
        most[r][v] = __builtin_convertvector(sum[r][v], Vec<float>) * splat(row.scale) * scale +
                     length * splat(row.error) + error * splat(row.narrow) +
                     whole * splat(row.rounding);
      }
    }
    field += kFields * kTokenStep;
    for (int j = 0; j < apart; ++j, field += kTokenStep) {
      SAE_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec<float> w = splat(rows[r]->apart[j]);
        SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
          most[r][v] += load_raw(field + v * kGroup) * w;
        }
      }
    }
    SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
      SAE_UNROLL for (int r = 0; r < kRows; ++r) {
        store(out + (v * kLatents + r) * kGroup, most[r][v]);
      }
    }
  }
};

}  // namespace sae::SAE_ISA
