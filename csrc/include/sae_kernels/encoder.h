// The encoder product streamed over tiles of latents: the [B, F] scores exist one cache-sized tile
// at a time, and a sink takes from each tile what it wants.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sae_kernels/parallel.h"
#include "sae_kernels/product_fma.h"
#include "sae_kernels/rows.h"

namespace sae::SAE_ISA {

// Carves pieces out of a thread's share of the workspace.
struct Carver {
  char* memory;
  template <class T = char>
  T* take(size_t bytes) {
    char* piece = memory;
    memory += aligned(bytes);
    return reinterpret_cast<T*>(piece);
  }
};

template <class Product>
struct Encoder {
  using E = typename Product::Element;
  using T = typename Product::T;
  static constexpr int kGroup = Product::kGroup;
  static_assert(Product::kLatents % 4 == 0 && kGroup == kLanes<T>);

  const void *x, *W, *b;
  int64_t B, D, F;
  int threads;
  Routes routes = {};
  int64_t tokens = block_tokens(Product::max_tokens(D));  // of one block

  // Experts have unlike numbers of tokens: of smaller blocks all threads get about as many.
  int64_t block_tokens(int64_t most) const {
    const int64_t step = Product::kTokenStep;
    const int64_t shares = threads * (routes.experts > 1 ? 4 : 1);
    const int64_t share = ((B + shares - 1) / shares + step - 1) / step * step;
    return std::min(most, std::max(share, step));
  }
  // As many for each expert as it has blocks if all tokens are its own; the others are empty.
  int64_t blocks() const { return routes.experts * blocks_of_expert(); }

  size_t thread_bytes() const {
    return packed_bytes() + Product::scratch_bytes(D) + aligned(kScoresBytes) +
           aligned(Product::kLatents * sizeof(T));
  }

  // make_sink(carver) is called once a thread. A sink has start_block(block, rows, count),
  // start_tile(f, latents, bias), scan(scores, bias, f, latents, token, count) and
  // finish_block(rows, count); scores are [vectors of a step][kLatents][kGroup tokens]. A tile
  // whose start_tile returns false is not multiplied.
  template <class MakeSink>
  void run(void* workspace, size_t sink_bytes, const MakeSink& make_sink) const {
    if (B == 0) return;
    const size_t bytes = thread_bytes() + sink_bytes;
    std::atomic<int64_t> next{0};
    on_threads(static_cast<int>(std::min<int64_t>(threads, blocks())), [&](int thread) {
      Carver carver{static_cast<char*>(workspace) + static_cast<size_t>(thread) * bytes};
      void* packed = carver.take(packed_bytes());
      void* scratch = carver.take(Product::scratch_bytes(D));
      T* scores = carver.template take<T>(kScoresBytes);
      T* bias = carver.template take<T>(Product::kLatents * sizeof(T));
      auto sink = make_sink(carver);
      Product::enter_thread();
      for (int64_t block; (block = next.fetch_add(1)) < blocks();) {
        const int64_t expert = block / blocks_of_expert();
        const int64_t start = routes.starts ? routes.starts[expert] : 0;
        const int64_t end = routes.starts ? routes.starts[expert + 1] : B;
        const int64_t size = block_size(end - start);
        const Rows rows = {routes.tokens, start + block % blocks_of_expert() * size};
        const int64_t count = std::min(size, end - rows.first);
        if (count <= 0) continue;
        sink.start_block(block, rows, count);
        encode_block(rows, count, expert, packed, scratch, scores, bias, sink);
        sink.finish_block(rows, count);
      }
      Product::leave_thread();
    });
  }

  static void fill(T* out, const void* from, int64_t f, int64_t latents, T missing) {
    const T* source = static_cast<const T*>(from);
    for (int64_t i = 0; i < latents; ++i) out[i] = source ? source[f + i] : missing;
  }

 private:
  static constexpr size_t kScoresBytes = sizeof(T) * Product::kTokenStep * Product::kLatents;

  int64_t blocks_of_expert() const { return (B + tokens - 1) / tokens; }
  // Equal parts: a small rest would read all of W for a few tokens.
  int64_t block_size(int64_t n) const {
    const int64_t parts = std::max<int64_t>((n + tokens - 1) / tokens, 1);
    const int64_t step = Product::kTokenStep;
    return ((n + parts - 1) / parts + step - 1) / step * step;
  }

  size_t packed_bytes() const {
    return aligned(static_cast<size_t>(tokens / Product::kTokenStep * Product::panel_bytes(D)));
  }

  template <class Sink>
  void encode_block(const Rows& tokens_of, int64_t count, int64_t expert, void* packed,
                    void* scratch, T* scores, T* bias, Sink& sink) const {
    const int64_t step = Product::kTokenStep, width = F / routes.experts;
    const int64_t padded = (count + step - 1) / step * step;
    const int64_t end = (expert + 1) * width;
    const E* w = static_cast<const E*>(W);
    Product::pack(static_cast<const E*>(x), tokens_of, count, padded, D, packed);
    for (int64_t f = expert * width; f < end; f += Product::kLatents) {
      const int64_t latents = std::min<int64_t>(Product::kLatents, end - f);
      const auto* rows = Product::rows(w + f * D, latents, D, scratch);
      fill(bias, b, f, latents, T{0});
      if (!sink.start_tile(f, latents, bias)) continue;
      // The next tile of W is fetched in equal shares while this one is multiplied.
      const char* ahead = reinterpret_cast<const char*>(w + (f + latents) * D);
      const int64_t next = std::min<int64_t>(Product::kLatents, end - f - latents);
      const int64_t share = next * D * static_cast<int64_t>(sizeof(E)) * step / padded;
      const char* panel = static_cast<const char*>(packed);
      for (int64_t token = 0; token < count; token += step) {
        Product::tile(panel, rows, latents, D, scores, ahead, share);
        sink.scan(scores, bias, f, latents, token, count);
        panel += Product::panel_bytes(D);
        ahead += share;
      }
    }
  }
};

// Tests the scores of one step of tokens, four latents by one branch; almost always nothing
// survives. test(scores, i) is a mask of tokens, visit(token, i, lane, scores) takes a survivor and
// renew(token) loads what test compares with for the tokens from there on.
template <class Product, class Renew, class Test, class Visit>
SAE_INLINE void scan_step(const typename Product::T* scores, int64_t latents, int64_t token,
                          int64_t count, const Renew& renew, const Test& test, const Visit& visit) {
  constexpr int kGroup = Product::kGroup;
  const int64_t end = std::min<int64_t>(count, token + Product::kTokenStep);
  for (; token < end; token += kGroup, scores += Product::kLatents * kGroup) {
    // Never wider than a group, so that nothing beyond a mask's own bits can pass.
    const uint64_t live = (uint64_t{1} << std::min<int64_t>(end - token, kGroup)) - 1;
    auto against = renew(token);
    for (int64_t i = 0; i < latents; i += 4) {
      uint64_t passed = 0;  // four latents by all tokens of the group
      SAE_UNROLL for (int u = 0; u < 4; ++u) {
        const uint64_t mask = test(scores + (i + u) * kGroup, i + u, against) & live;
        passed |= mask << (u * kGroup);
      }
      if (__builtin_expect(passed == 0, 1)) continue;
      // One loop over the bits of all four: leaving a loop is what is guessed wrong.
      const uint64_t there =
          i + 4 > latents ? (uint64_t{1} << (latents - i) * kGroup) - 1 : ~uint64_t{0};
      for (passed &= there; passed; passed &= passed - 1) {
        const int bit = __builtin_ctzll(passed);
        visit(token + bit % kGroup, i + bit / kGroup, scores[i * kGroup + bit]);
      }
      against = renew(token);
    }
  }
}

}  // namespace sae::SAE_ISA
