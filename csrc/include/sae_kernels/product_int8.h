// The narrow product that screens latents: tokens in signed, latents in unsigned bytes, exact sums
// in 32 bits, turned into bounds that no score of the fp32 product exceeds (docs/numerics.md).
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

#include "sae_kernels/narrow.h"
#include "sae_kernels/product_amx.h"
#include "sae_kernels/product_fma.h"

namespace sae::SAE_ISA {

struct Int8Product {
  using Wide = FmaProduct<float>;
  static constexpr int kGroup = Wide::kGroup, kVectors = Wide::kVectors, kRows = Wide::kRows;
  static constexpr int kLatents = Wide::kLatents, kTokenStep = Wide::kTokenStep;
  static constexpr int kApart = 4;  // columns at most that are multiplied apart, in fp32

  // Whether this machine has the instruction, and this variant a product with it.
  static bool runs(Screening how) {
#if defined(__AVX2__)
    unsigned a = 0, b = 0, c = 0, d = 0;
#if defined(__AMX_INT8__)
    if (how == Screening::tiles) return true;
#endif
#if defined(__AVX512F__)  // AVX-512 VNNI
    return how == Screening::fours && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
#else
    if (how == Screening::pairs) return true;  // AVX-VNNI
    return how == Screening::fours && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
#else
    return how == Screening::plain;
#endif
  }

  // As long as it lives, AMX's tiles are this thread's, where products need them.
  struct Tiles {
    explicit Tiles(Screening how) : tiles(how == Screening::tiles) {
#if defined(__AMX_INT8__)
      if (tiles) AmxProduct::enter_thread();
#endif
    }
    ~Tiles() {
#if defined(__AMX_INT8__)
      if (tiles) AmxProduct::leave_thread();
#endif
    }
    Tiles(const Tiles&) = delete;
    const bool tiles;
  };

  // A latent but for its bytes, as bounds take it.
  struct Latent {
    float scale, narrow, error, rounding;
    float apart[kApart];
  };

  // Of one step of tokens: bytes [quad][token][4], what is added to sums in 16 bits
  // [quad / kQuads][token][2], then what Token holds and the columns apart, [token] each.
  static int64_t panel_bytes(int64_t D) {
    return fields_at(D) + kTokenStep * (kFields + kApart) * static_cast<int64_t>(sizeof(float));
  }

  // Of a token's numbers. Sums in 16 bits hold two products with a byte up to 255, and eight with
  // what is left of it without the 128: these are 128 and 258 for the token's own bytes, of which
  // rounding adds a half each.
  static float steps(Screening how, const float* row, int64_t D) {
    float most = 0, least = 0;  // the largest magnitude, and what 127 steps must be at least
    for (int64_t first = 0; how == Screening::pairs && first < D; first += 4 * kQuads) {
      float sums[2] = {};
      for (int64_t d = first; d < std::min(D, first + 4 * kQuads); ++d) {
        const float pair = std::fabs(row[d & ~1]) + (d % 2 ? std::fabs(row[d]) : 0.0f);
        most = std::max(most, std::fabs(row[d]));
        least = std::max(least, pair);
        sums[d / 2 % 2] += std::fabs(row[d]);
      }
      least = std::max(least, std::max(sums[0], sums[1]) / 2);
    }
    return least == 0 ? 127 : 127 * (most / least);
  }

  // Puts a token into its place in the packed panels and returns where its columns apart go, one
  // every kTokenStep. `whole` is its length with them.
  static float* pack(Screening how, const int8_t* q, const NarrowRow& row, float whole,
                     int64_t token, int64_t D, void* packed) {
    char* panel = static_cast<char*>(packed) + token / kTokenStep * panel_bytes(D);
    const int64_t lane = token % kTokenStep;
    uint32_t* quad = reinterpret_cast<uint32_t*>(panel) + lane;
    for (int64_t d = 0; d < narrow_stride(D); d += 4, quad += kTokenStep) {
      std::memcpy(quad, q + d, sizeof(*quad));
    }
    for (int64_t first = 0; kPairs && first < narrow_stride(D); first += 4 * kQuads) {
      int sums[2] = {};
      for (int64_t d = first; d < first + 4 * kQuads; ++d) sums[d / 2 % 2] += q[d];
      // Modulo 2^16, as are sums.
      *quad = static_cast<uint32_t>(-128 * sums[0]) & 0xffff;
      *quad |= static_cast<uint32_t>(-128 * sums[1]) << 16;
      quad += kTokenStep;
    }
    const int32_t start = how == Screening::pairs ? 0 : -128 * row.sum;
    float* field = reinterpret_cast<float*>(panel + fields_at(D)) + lane;
    std::memcpy(field + kStart * kTokenStep, &start, sizeof(start));
    field[kScale * kTokenStep] = row.scale;
    field[kLength * kTokenStep] = row.length();
    field[kError * kTokenStep] = row.error;
    field[kWhole * kTokenStep] = whole;
    return field + kFields * kTokenStep;
  }

  // bounds[kVectors][kLatents][kGroup]: none is below the score of its latent and token. Rows of w
  // are narrow_stride(D) apart. Meanwhile `fetch` bytes from `ahead` on are brought near.
  __attribute__((noinline)) static void tile(Screening how, const char* panel, const uint8_t* w,
                                             const Latent* latents, int64_t n, int64_t D, int apart,
                                             float* bounds, const char* ahead, int64_t fetch) {
    int32_t* sums = reinterpret_cast<int32_t*>(bounds);
    switch (how) {
#if defined(__AMX_INT8__)
      case Screening::tiles:
        sum_tiles(panel, w, n, D, sums, ahead, fetch);
        break;
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
      case Screening::pairs:
        sum_pairs(panel, w, n, D, sums, ahead, fetch);
        break;
#endif
      default:
        sum_fours(panel, w, n, D, sums, ahead, fetch);
    }
    bound(reinterpret_cast<const float*>(panel + fields_at(D)), latents, n, apart, bounds);
  }

 private:
  enum Token { kStart, kScale, kLength, kError, kWhole, kFields };
  static constexpr bool kPairs = kVectorBytes == 32;
  static constexpr int kQuads = 4;  // of four bytes each, whose products are added in 16 bits

  static int64_t fields_at(int64_t D) {
    return kTokenStep * (narrow_stride(D) + (kPairs ? narrow_stride(D) / kQuads : 0));
  }

  // Adds to each sum four products of bytes, unsigned ones of w and signed ones of x.
  SAE_INLINE static Vec<int32_t> plus_fours(Vec<int32_t> sum, Vec<int32_t> w, Vec<int32_t> x) {
    // Named to the assembler: the variant's own flags are those of machines that may not have them.
#if defined(__AVX512F__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
#elif defined(__AVX2__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
#else
    uint8_t a[sizeof(w)];
    int8_t b[sizeof(x)];
    std::memcpy(a, &w, sizeof(w));
    std::memcpy(b, &x, sizeof(x));
    for (int i = 0; i < static_cast<int>(sizeof(a)); ++i) sum[i / 4] += a[i] * b[i];
#endif
    return sum;
  }

  // Four bytes of a latent for every token.
  SAE_INLINE static Vec<int32_t> load_quad(const uint8_t* w) {
    int32_t bytes;
    std::memcpy(&bytes, w, sizeof(bytes));
    return splat(bytes);
  }
  SAE_INLINE static Vec<int32_t> load_tokens(const char* panel, int v) {
    return load_raw(reinterpret_cast<const int32_t*>(panel) + v * kGroup);
  }

  static void sum_fours(const char* panel, const uint8_t* w, int64_t n, int64_t D, int32_t* sums,
                        const char* ahead, int64_t fetch) {
    const int64_t stride = narrow_stride(D), each = fetch * kRows * 4 / (n * stride) + 1;
    for (int64_t first = 0; first < n; first += kRows) {
      const uint8_t* rows = w + first * stride;
      const char* x = panel;
      Vec<int32_t> sum[kRows][kVectors] = {};
      for (int64_t d = 0; d < stride; d += 4, x += 4 * kTokenStep) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += each;
        Vec<int32_t> tokens[kVectors];
        SAE_UNROLL for (int v = 0; v < kVectors; ++v) tokens[v] = load_tokens(x, v);
        SAE_UNROLL for (int r = 0; r < kRows; ++r) {
          const Vec<int32_t> quad = load_quad(rows + r * stride + d);
          SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = plus_fours(sum[r][v], quad, tokens[v]);
          }
        }
      }
      SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
        SAE_UNROLL for (int r = 0; r < kRows; ++r) {
          store(sums + (v * kLatents + first + r) * kGroup, sum[r][v]);
        }
      }
    }
  }

#if defined(__AVX2__) && !defined(__AVX512F__)
  // Products are added in 16 bits as long as these hold them, and rarely in 32.
  static void sum_pairs(const char* panel, const uint8_t* w, int64_t n, int64_t D, int32_t* sums,
                        const char* ahead, int64_t fetch) {
    const int64_t stride = narrow_stride(D), each = fetch * kRows * 16 / (n * stride) + 1;
    for (int64_t first = 0; first < n; first += kRows) {
      const uint8_t* rows = w + first * stride;
      const char *x = panel, *start = panel + stride * kTokenStep;
      for (int64_t d = 0; d < stride; d += 4 * kQuads, start += 4 * kTokenStep) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += each;
        __m256i sum[kRows][kVectors];
        SAE_UNROLL for (int r = 0; r < kRows; ++r) {
          SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = reinterpret_cast<__m256i>(load_tokens(start, v));
          }
        }
        SAE_UNROLL for (int i = 0; i < kQuads; ++i, x += 4 * kTokenStep) {
          SAE_UNROLL for (int r = 0; r < kRows; ++r) {
            const auto quad = reinterpret_cast<__m256i>(load_quad(rows + r * stride + d + 4 * i));
            SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
              const auto tokens = reinterpret_cast<__m256i>(load_tokens(x, v));
              sum[r][v] = _mm256_add_epi16(sum[r][v], _mm256_maddubs_epi16(quad, tokens));
              asm volatile("" : "+x"(sum[r][v]));
            }
          }
        }
        SAE_UNROLL for (int r = 0; r < kRows; ++r) {
          SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
            int32_t* out = sums + (v * kLatents + first + r) * kGroup;
            const auto wide =
                reinterpret_cast<Vec<int32_t>>(_mm256_madd_epi16(sum[r][v], _mm256_set1_epi16(1)));
            store(out, d ? load_raw(out) + wide : wide);
          }
        }
      }
    }
  }
#endif

#if defined(__AMX_INT8__)
  // Sixteen latents by four times sixteen tokens.
  static void sum_tiles(const char* panel, const uint8_t* w, int64_t n, int64_t D, int32_t* sums,
                        const char* ahead, int64_t fetch) {
    static_assert(kGroup == 16 && kVectors == 4 && kLatents % kGroup == 0);
    constexpr int64_t kApartBytes = 4 * kTokenStep, kBytes = 4 * kGroup;
    const int64_t stride = narrow_stride(D), each = fetch * kGroup * 64 / (n * stride) + 1;
    for (int64_t first = 0; first < n; first += kGroup) {
      const char* x = panel;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t d = 0; d < stride; d += 64, x += 64 * kTokenStep, ahead += each) {
        for (int64_t i = 0; i < each; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
        _tile_loadd(4, w + first * stride + d, stride);
        _tile_loadd(5, x, kApartBytes);
        _tile_dpbusd(0, 4, 5);
        _tile_loadd(6, x + kBytes, kApartBytes);
        _tile_dpbusd(1, 4, 6);
        _tile_loadd(7, x + 2 * kBytes, kApartBytes);
        _tile_dpbusd(2, 4, 7);
        _tile_loadd(5, x + 3 * kBytes, kApartBytes);
        _tile_dpbusd(3, 4, 5);
      }
      int32_t* out = sums + first * kGroup;
      _tile_stored(0, out, kBytes);
      _tile_stored(1, out + kLatents * kGroup, kBytes);
      _tile_stored(2, out + 2 * kLatents * kGroup, kBytes);
      _tile_stored(3, out + 3 * kLatents * kGroup, kBytes);
    }
  }
#endif

  // Turns sums into bounds, in place.
  static void bound(const float* fields, const Latent* latents, int64_t n, int apart,
                    float* bounds) {
    for (int v = 0; v < kVectors; ++v, fields += kGroup, bounds += kLatents * kGroup) {
      const auto of_tokens = [&](int which) SAE_INLINE_LAMBDA {
        return load_raw(fields + which * kTokenStep);
      };
      const auto start = reinterpret_cast<Vec<int32_t>>(of_tokens(kStart));
      const Vec<float> scale = of_tokens(kScale), length = of_tokens(kLength);
      const Vec<float> error = of_tokens(kError), whole = of_tokens(kWhole);
      for (int64_t i = 0; i < n; ++i) {
        const Latent& row = latents[i];
        const auto sum = reinterpret_cast<Vec<int32_t>>(load_raw(bounds + i * kGroup)) + start;
        Vec<float> most = __builtin_convertvector(sum, Vec<float>) * splat(row.scale) * scale +
                          length * splat(row.error) + error * splat(row.narrow) +
                          whole * splat(row.rounding);
        for (int j = 0; j < apart; ++j) most += of_tokens(kFields + j) * splat(row.apart[j]);
        store(bounds + i * kGroup, most);
      }
    }
  }
};

}  // namespace sae::SAE_ISA
