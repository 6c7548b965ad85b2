// Bounds on the scores of few tokens from rows of W kept in 8 bits, a quarter of the bytes of fp32
// ones: no score of FewTokens lies outside of them (docs/numerics.md).
#pragma once

#include "sae_kernels/few_tokens.h"
#include "sae_kernels/narrow.h"

namespace sae::SAE_ISA {

SAE_INLINE Vec<int16_t> load_wide(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<int16_t>>(
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<int16_t>>(
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  typename VectorOf<int8_t, kLanes<int16_t>>::type few;
  std::memcpy(&few, p, sizeof(few));
  return __builtin_convertvector(few, Vec<int16_t>);
#endif
}

// The products of two and two neighbours, added up.
SAE_INLINE Vec<int32_t> multiply_pairs(Vec<int16_t> a, Vec<int16_t> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<int32_t>>(
      _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<int32_t>>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  Vec<int32_t> sum;
  for (int i = 0; i < kLanes<int32_t>; ++i)
    sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

template <class E>
struct FewNarrow {
  static constexpr int kLatents = FewTiles::kLatents;
  static constexpr bool kExact = false;  // scans are given bounds

  static bool pays(int64_t B, int64_t D) { return B <= FewTiles::kMost && D <= kNarrowWidth; }

  // A latent's row: its numbers, zeros up to a whole stride, then Fields in fp32. Who made it took
  // care of rows that cannot be bounded: their error is NaN, and so are the bounds.
  enum Field { kScale, kNarrow, kError, kFields = 4 };
  static int64_t stride(int64_t D) { return (D + 31) / 32 * 32; }
  static int64_t row_bytes(int64_t D) {
    return stride(D) + kFields * static_cast<int64_t>(sizeof(float));
  }

  template <class Args>
  explicit FewNarrow(const Args& args, const Routes& routes = {})
      : x(static_cast<const E*>(args.x)),
        W(args.narrow),
        b(args.b),
        D(args.D),
        tiles{args.B, args.D, args.F, row_bytes(args.D), args.threads, routes} {}

  const E* x;
  const int8_t* W;
  const void* b;
  int64_t D;
  FewTiles tiles;

  size_t workspace() const {
    return aligned(static_cast<size_t>(tiles.B * stride(D)) * sizeof(int16_t)) +
           aligned(static_cast<size_t>(tiles.B) * sizeof(Token)) +
           aligned(static_cast<size_t>(D) * sizeof(float));
  }

  // As FewTokens::run, but scan(token, least, most, live) is given bounds on the scores.
  template <class MakeSink>
  void run(void* workspace, const MakeSink& make_sink) const {
    char* memory = static_cast<char*>(workspace);
    int16_t* q = reinterpret_cast<int16_t*>(memory);
    memory += aligned(static_cast<size_t>(tiles.B * stride(D)) * sizeof(int16_t));
    Token* tokens = reinterpret_cast<Token*>(memory);
    memory += aligned(static_cast<size_t>(tiles.B) * sizeof(Token));
    for (int64_t t = 0; t < tiles.B; ++t) {
      tokens[t] =
          narrowed(x + tiles.rows()[t] * D, q + t * stride(D), reinterpret_cast<float*>(memory));
    }
    tiles.run(make_sink, [&](int64_t tile, int64_t following, auto& sink) {
      encode_tile(tile, following, q, tokens, sink);
    });
  }

 private:
  static constexpr int kRows = 4;    // of a micro tile
  static constexpr int kWidest = 4;  // its tokens

  struct Token {
    float scale, length, error, rounding;
  };

  // As many steps as keep every sum of products within 32 bits.
  float steps() const {
    return static_cast<float>(
        std::min<int64_t>(32767, std::numeric_limits<int32_t>::max() / (127 * D)));
  }

  Token narrowed(const E* row, int16_t* q, float* wide) const {
    for_each_vector<float>(D, [&](auto get, auto put) SAE_INLINE_LAMBDA { put(wide, get(row)); });
    std::memset(q, 0, static_cast<size_t>(stride(D)) * sizeof(int16_t));
    NarrowRow out;
    if (!narrow_row(wide, D, q, out, steps())) {
      std::memset(q, 0, static_cast<size_t>(stride(D)) * sizeof(int16_t));
      return {0, 0, std::numeric_limits<float>::quiet_NaN(), 0};
    }
    // Of a sum of D products and a hundred operations more.
    const float rounding = static_cast<float>(D + 128) * 1.01f * 0x1p-24f;
    return {out.scale, out.length(), out.error, rounding * out.length()};
  }

  template <class Sink>
  void encode_tile(int64_t tile, int64_t following, const int16_t* q, const Token* tokens,
                   Sink& sink) const {
    const int64_t expert = tiles.expert(tile), f = tiles.latent(tile);
    const int64_t latents = tiles.latents(tile), end = tiles.end(expert);
    const int8_t* rows[kLatents];
    const float* fields[kLatents];
    for (int64_t i = 0; i < kLatents; ++i) {
      rows[i] = W + (f + std::min(i, latents - 1)) * row_bytes(D);
      fields[i] = reinterpret_cast<const float*>(rows[i] + stride(D));
    }
    const int8_t* ahead = W + tiles.ahead(tile, following) * row_bytes(D);
    const Vec<float> bias = of_tile(b, f, latents);
    const uint32_t live = (uint32_t{1} << latents) - 1;
    sink.start_tile(f, latents);
    for (int64_t t = tiles.start(expert); t < end; t += kWidest, ahead = nullptr) {
      const int64_t count = std::min<int64_t>(kWidest, end - t);
      int32_t sums[kWidest][kLatents];
      for (int r = 0; r < kLatents; r += kRows) {
        dots<kWidest>(count, q + t * stride(D), rows + r, ahead, &sums[0][r]);
        if (ahead) ahead += kRows * row_bytes(D);
      }
      Vec<float> of_latents[kFields];
      load_columns(fields, 0, of_latents);
      const Vec<float> scale = of_latents[kScale], narrow = of_latents[kNarrow];
      const Vec<float> error = of_latents[kError], length = narrow + error;
      for (int64_t i = 0; i < count; ++i) {
        const Token& own = tokens[t + i];
        const Vec<float> score =
            __builtin_convertvector(load_raw(sums[i]), Vec<float>) * scale * splat(own.scale);
        const Vec<float> margin =
            splat(own.length) * error + splat(own.error) * narrow + splat(own.rounding) * length;
        sink.scan(t + i, score - margin + bias, score + margin + bias, live);
      }
    }
  }

  template <int kTokens>
  void dots(int64_t tokens, const int16_t* q, const int8_t* const* rows, const int8_t* ahead,
            int32_t* out) const {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return dots<kTokens - 1>(tokens, q, rows, ahead, out);
    }
    micro<kTokens>(q, rows, ahead, out);
  }

  // out[token][kLatents]: kRows sums of each token.
  template <int kTokens>
  __attribute__((noinline)) void micro(const int16_t* q, const int8_t* const* rows,
                                       const int8_t* ahead, int32_t* out) const {
    Vec<int32_t> sum[kRows][kTokens] = {};
    const int64_t n = stride(D);
    for (int64_t d = 0; d < n; d += kLanes<int16_t>) {
      if (ahead) {
        SAE_UNROLL for (int i = 0; i < kRows * kLanes<int16_t>; i += 64) {
          __builtin_prefetch(ahead + i, 0, 3);
        }
        ahead += kRows * kLanes<int16_t>;
      }
      Vec<int16_t> w[kRows];
      SAE_UNROLL for (int r = 0; r < kRows; ++r) w[r] = load_wide(rows[r] + d);
      SAE_UNROLL for (int t = 0; t < kTokens; ++t) {
        const Vec<int16_t> x_d = load_raw(q + t * n + d);
        SAE_UNROLL for (int r = 0; r < kRows; ++r) sum[r][t] += multiply_pairs(w[r], x_d);
      }
    }
    SAE_UNROLL for (int t = 0; t < kTokens; ++t) {
      SAE_UNROLL for (int r = 0; r < kRows; ++r) {
        out[t * kLatents + r] = sum_of_lanes<int32_t>(sum[r][t]);
      }
    }
  }
};

template <class E>
struct PairOfRows {
  const E *x, *w;
};

// Calls take(i, score) with the score of each of n pairs, the PairOfRows at(i). The order of sums
// is FmaProduct's.
template <class E, class At, class Take>
void score_pairs(int64_t n, int64_t D, const At& at, const Take& take) {
  for (int64_t first = 0; first < n; first += kLanes<float>) {
    const int64_t count = std::min<int64_t>(kLanes<float>, n - first);
    const E *x[kLanes<float>], *w[kLanes<float>];
    for (int64_t j = 0; j < kLanes<float>; ++j) {
      const PairOfRows<E> pair = at(first + std::min(j, count - 1));
      x[j] = pair.x, w[j] = pair.w;
    }
    const Vec<float> scores = dot_pairs(x, w, D);
    for (int64_t j = 0; j < count; ++j) take(first + j, scores[j]);
  }
}

}  // namespace sae::SAE_ISA
