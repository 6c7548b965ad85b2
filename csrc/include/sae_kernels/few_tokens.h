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

// The tiles of latents of a call with few tokens, which all its threads take from.
struct FewTiles {
  static constexpr int kLatents = kLanes<float>;  // of one tile
  static constexpr int64_t kMost = 16;            // tokens

  int64_t B, D, F, row_bytes;  // of what is read of a latent
  int most_threads;
  Routes routes;

  // As many as have something to read.
  int threads() const {
    return static_cast<int>(std::max<int64_t>(
        1, std::min<int64_t>({most_threads, count(), F * row_bytes / kThreadBytes})));
  }
  int64_t count() const { return routes.experts * of_expert(); }
  int64_t expert(int64_t tile) const { return tile / of_expert(); }
  int64_t latent(int64_t tile) const {
    return expert(tile) * width() + tile % of_expert() * kLatents;
  }
  int64_t latents(int64_t tile) const {
    return std::min<int64_t>(kLatents, (expert(tile) + 1) * width() - latent(tile));
  }
  // The first latent of the tile that a thread takes next; past the last one the tile's own.
  int64_t ahead(int64_t tile, int64_t following) const {
    return latent(following < count() ? following : tile);
  }
  // Of an expert's tokens, by their places among the rows.
  int64_t start(int64_t expert) const { return routes.starts ? routes.starts[expert] : 0; }
  int64_t end(int64_t expert) const { return routes.starts ? routes.starts[expert + 1] : B; }
  Rows rows() const { return {routes.tokens, 0}; }

  // encode(tile, following, sink) is called for the tiles that have tokens, ascending for a thread;
  // make_sink(thread) once a thread.
  template <class MakeSink, class Encode>
  void run(const MakeSink& make_sink, const Encode& encode) const {
    // Neighbours are taken together: threads that take every other tile read W a quarter slower.
    const int64_t run = std::max<int64_t>(
        1, std::min(count() / (4 * threads()), kRunBytes / (kLatents * row_bytes)));
    std::atomic<int64_t> next{0};
    on_threads(threads(), [&](int thread) {
      auto sink = make_sink(thread);
      for (int64_t tile = next.fetch_add(run), last = tile + run - 1; tile < count();) {
        int64_t following = tile + 1;
        if (tile == last) following = next.fetch_add(run), last = following + run - 1;
        if (start(expert(tile)) < end(expert(tile))) encode(tile, following, sink);
        tile = following;
      }
    });
  }

 private:
  static constexpr int64_t kThreadBytes = 1 << 16, kRunBytes = 1 << 20;

  int64_t width() const { return F / routes.experts; }
  int64_t of_expert() const { return (width() + kLatents - 1) / kLatents; }
};

// A vector per latent, of a tile's latents; zeros where there is none.
SAE_INLINE Vec<float> of_tile(const void* vector, int64_t f, int64_t latents) {
  const float* from = static_cast<const float*>(vector) + f;
  if (!vector) return Vec<float>{};
  return latents == kLanes<float> ? load(from) : load_tail(from, latents);
}

template <class E>
struct FewTokens {
  static constexpr int kLatents = FewTiles::kLatents;
  static constexpr bool kExact = true;  // scans are given scores, not bounds

  // Whether a product's sums are those that are made here.
  template <class Product>
  static constexpr bool kServes = std::is_same<Product, FmaProduct<E>>::value &&
                                  std::is_same<typename Product::T, float>::value;
  // Whether a call that could be served should be.
  static bool pays(int64_t B, Screening how) {
    return B <= FewTiles::kMost && how == Screening::none;
  }

  template <class Args>
  explicit FewTokens(const Args& args, const Routes& routes = {})
      : x(static_cast<const E*>(args.x)),
        W(static_cast<const E*>(args.W)),
        b(args.b),
        D(args.D),
        tiles{args.B,       args.D, args.F, args.D * static_cast<int64_t>(sizeof(E)),
              args.threads, routes} {}

  const E *x, *W;
  const void* b;
  int64_t D;
  FewTiles tiles;

  size_t workspace() const { return aligned(static_cast<size_t>(2 * tiles.B * D) * sizeof(float)); }

  // A sink has start_tile(f, latents), whose latents ascend, and then scan(token, h, live) for each
  // token, by its place among the rows: the scores with their bias of the tile's latents, of which
  // the bits of live are there.
  template <class MakeSink>
  void run(void* workspace, const MakeSink& make_sink) const {
    float* packed = static_cast<float*>(workspace);
    for (int64_t e = 0; e < tiles.routes.experts; ++e) pack(e, packed);
    tiles.run(make_sink, [&](int64_t tile, int64_t following, auto& sink) {
      encode_tile(tile, following, packed, sink);
    });
  }

 private:
  static constexpr int kWidest = kVectorBytes == 64 ? 16 : 8;  // tokens whose sums fit registers

  // Tokens go by 1, 2, 4 .. kWidest, [D, as many]: at most twice as many as there are, so those
  // from the i-th on find room at 2 i. A missing one repeats the last.
  static int64_t group(int64_t count) {
    int64_t n = 1;
    while (n < count && n < kWidest) n *= 2;
    return n;
  }

  void pack(int64_t expert, float* packed) const {
    const Rows rows = tiles.rows();
    const int64_t end = tiles.end(expert);
    for (int64_t t = tiles.start(expert); t < end; t += kWidest) {
      const int64_t count = std::min<int64_t>(kWidest, end - t), n = group(count);
      float* out = packed + 2 * t * D;
      for (int64_t i = 0; i < n; ++i) {
        const E* row = x + rows[t + std::min(i, count - 1)] * D;
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
    const int64_t expert = tiles.expert(tile), f = tiles.latent(tile);
    const int64_t latents = tiles.latents(tile), end = tiles.end(expert);
    const E* rows[kLatents];
    for (int64_t i = 0; i < kLatents; ++i) rows[i] = W + (f + std::min(i, latents - 1)) * D;
    // This thread's next rows are fetched as they lie, which memory likes better than many rows'
    // pieces.
    const E* ahead = W + tiles.ahead(tile, following) * D;
    const Vec<float> bias = of_tile(b, f, latents);
    const uint32_t live = (uint32_t{1} << latents) - 1;
    sink.start_tile(f, latents);
    for (int64_t t = tiles.start(expert); t < end; t += kWidest, ahead = nullptr) {
      const int64_t count = std::min<int64_t>(kWidest, end - t);
      Vec<float> scores[kWidest];
      dots<kWidest>(group(count), packed + 2 * t * D, rows, ahead, scores);
      for (int64_t i = 0; i < count; ++i) sink.scan(t + i, scores[i] + bias + 0.0f, live);
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
    // So few tokens ask for lines faster than these come, and what is asked for then is dropped:
    // it is asked for once more, a hundred lines later.
    constexpr bool kTwice = kTokens < 8;
    Vec<float> sum[kTokens] = {};
    int64_t d = 0;
    for (; d + n <= D; d += n) {
      if (ahead) {
        SAE_UNROLL for (int i = 0; i < kLatents * n; i += kLine)
            __builtin_prefetch(ahead + i, 0, 3);
        SAE_UNROLL for (int i = 0; kTwice && i < kLatents * n; i += kLine)
            __builtin_prefetch(ahead + i - 100 * kLine, 0, 3);
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
};

}  // namespace sae::SAE_ISA
