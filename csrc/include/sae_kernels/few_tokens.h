// The encoder product for few tokens, which would not fill a block's vectors: lanes are latents.
// Threads share the tiles of latents instead of the tokens, so all of them read W, once. Sums are
// those of FmaProduct, one accumulator over d = 0 .. D-1, so scores are bit for bit a block's.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sae_kernels/parallel.h"
#include "sae_kernels/product_fma.h"
#include "sae_kernels/rescore.h"
#include "sae_kernels/rows.h"

namespace sae::SAE_ISA {

template <class E>
struct FewTokens {
  static constexpr int kLatents = kLanes<float>;  // of one tile
  static constexpr int64_t kMost = 16;            // tokens

  // Whether a product's sums are those that are made here.
  template <class Product>
  static constexpr bool kServes = std::is_same<Product, FmaProduct<E>>::value &&
                                  std::is_same<typename Product::T, float>::value;
  // Whether a call that could be served should be.
  static bool pays(int64_t B, bool screened) { return B <= kMost && !screened; }

  const void *x, *W, *b;
  int64_t B, D, F;
  int most_threads;
  Routes routes = {};

  // As many as have something to read.
  int threads() const {
    const int64_t bytes = F * D * static_cast<int64_t>(sizeof(E));
    return static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>({most_threads, tiles(), bytes / kThreadBytes})));
  }

  size_t workspace() const { return aligned(static_cast<size_t>(2 * B * D) * sizeof(float)); }

  // make_sink(thread) is called once a thread. A sink has start_tile(f, latents), whose latents
  // ascend, and then scan(token, h, live) for each token, by its place among the rows: the scores
  // with their bias of the tile's latents, of which the bits of live are there.
  template <class MakeSink>
  void run(void* workspace, const MakeSink& make_sink) const {
    if (B == 0) return;
    float* packed = static_cast<float*>(workspace);
    for (int64_t e = 0; e < routes.experts; ++e) pack(e, packed);
    std::atomic<int64_t> next{0};
    on_threads(threads(), [&](int thread) {
      auto sink = make_sink(thread);
      for (int64_t tile = next.fetch_add(1); tile < tiles();) {
        const int64_t following = next.fetch_add(1);
        encode_tile(tile, following, packed, sink);
        tile = following;
      }
    });
  }

 private:
  static constexpr int64_t kThreadBytes = 1 << 16;
  static constexpr int kWidest = kVectorBytes == 64 ? 16 : 8;  // tokens whose sums fit registers

  int64_t width() const { return F / routes.experts; }
  int64_t tiles_of_expert() const { return (width() + kLatents - 1) / kLatents; }
  int64_t tiles() const { return routes.experts * tiles_of_expert(); }
  int64_t latent(int64_t tile) const {
    return tile / tiles_of_expert() * width() + tile % tiles_of_expert() * kLatents;
  }
  int64_t start(int64_t expert) const { return routes.starts ? routes.starts[expert] : 0; }
  int64_t end(int64_t expert) const { return routes.starts ? routes.starts[expert + 1] : B; }

  // Tokens go by 1, 2, 4 .. kWidest, [D, as many]: at most twice as many as there are, so those
  // from the i-th on find room at 2 i. A missing one repeats the last.
  static int64_t group(int64_t count) {
    int64_t n = 1;
    while (n < count && n < kWidest) n *= 2;
    return n;
  }

  void pack(int64_t expert, float* packed) const {
    const Rows rows = {routes.tokens, 0};
    for (int64_t t = start(expert); t < end(expert); t += kWidest) {
      const int64_t count = std::min<int64_t>(kWidest, end(expert) - t), n = group(count);
      float* out = packed + 2 * t * D;
      for (int64_t i = 0; i < n; ++i) {
        const E* row = static_cast<const E*>(x) + rows[t + std::min(i, count - 1)] * D;
        for (int64_t d = 0; d < D; d += kLatents) {
          const int64_t there = std::min<int64_t>(kLatents, D - d);
          const Vec<float> some = there == kLatents ? load(row + d) : load_tail(row + d, there);
          for (int64_t j = 0; j < there; ++j) out[(d + j) * n + i] = some[j];
        }
      }
    }
  }

  template <class Sink>
  void encode_tile(int64_t tile, int64_t following, const float* packed, Sink& sink) const {
    const int64_t expert = tile / tiles_of_expert(), f = latent(tile);
    if (start(expert) == end(expert)) return;
    const int64_t latents = std::min<int64_t>(kLatents, (expert + 1) * width() - f);
    const E *w = static_cast<const E*>(W), *rows[kLatents];
    for (int64_t i = 0; i < kLatents; ++i) rows[i] = w + (f + std::min(i, latents - 1)) * D;
    // This thread's next rows are fetched as they lie, which memory likes better than many rows'
    // pieces; past the last tile those of this one are.
    const E* ahead = w + (following < tiles() ? latent(following) : f) * D;
    const float* bias = static_cast<const float*>(b) + f;
    const Vec<float> added = !b                    ? Vec<float>{}
                             : latents == kLatents ? load(bias)
                                                   : load_tail(bias, latents);
    const uint32_t live = (uint32_t{1} << latents) - 1;
    sink.start_tile(f, latents);
    for (int64_t t = start(expert); t < end(expert); t += kWidest, ahead = nullptr) {
      const int64_t count = std::min<int64_t>(kWidest, end(expert) - t);
      Vec<float> scores[kWidest];
      dots<kWidest>(group(count), packed + 2 * t * D, rows, ahead, scores);
      for (int64_t i = 0; i < count; ++i) sink.scan(t + i, scores[i] + added + 0.0f, live);
    }
  }

  template <int kTokens>
  void dots(int64_t tokens, const float* packed, const E* const (&rows)[kLatents], const E* ahead,
            Vec<float>* out) const {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return dots<kTokens / 2>(tokens, packed, rows, ahead, out);
    }
    micro<kTokens>(packed, rows, ahead, out);
  }

  template <int kTokens>
  __attribute__((noinline)) void micro(const float* packed, const E* const (&rows)[kLatents],
                                       const E* ahead, Vec<float>* out) const {
    constexpr int kLine = 64 / static_cast<int>(sizeof(E)), n = kColumns<E>;
    Vec<float> sum[kTokens] = {};
    int64_t d = 0;
    for (; d + n <= D; d += n) {
      if (ahead) {
        SAE_UNROLL for (int i = 0; i < kLatents * n; i += kLine)
            __builtin_prefetch(ahead + i, 0, 3);
        ahead += kLatents * n;
      }
      Vec<float> columns[n];
      load_columns(rows, d, columns);
      SAE_UNROLL for (int i = 0; i < n; ++i) {
        SAE_UNROLL for (int t = 0; t < kTokens; ++t) sum[t] += columns[i] * splat(packed[t]);
        packed += kTokens;
      }
    }
    for (; d < D; ++d, packed += kTokens) {
      float column[kLatents];
      for (int i = 0; i < kLatents; ++i) column[i] = widened(rows[i][d]);
      SAE_UNROLL for (int t = 0; t < kTokens; ++t) sum[t] += load_raw(column) * splat(packed[t]);
    }
    SAE_UNROLL for (int t = 0; t < kTokens; ++t) out[t] = sum[t];
  }

  static float widened(E value) { return load_tail(&value, 1)[0]; }
};

}  // namespace sae::SAE_ISA
