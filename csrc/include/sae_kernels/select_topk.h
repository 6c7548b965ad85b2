// select_topk: the encoder product streamed over tiles of latents, keeping per token only the
// entries that can still win. The [B, F] scores exist one cache-sized tile at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sae_kernels/candidates.h"
#include "sae_kernels/parallel.h"
#include "sae_kernels/product_fma.h"

namespace sae::SAE_ISA {

template <class Product, bool kScaled>
class SelectTopk {
  using E = typename Product::Element;
  using T = typename Product::T;
  using List = Candidates<T, kScaled>;

 public:
  explicit SelectTopk(const SelectTopkArgs& args) : a(args) {
    // Longer lists are cut less often, shorter ones tighten the threshold earlier.
    const int64_t vector = kLanes<Key<T>>;
    capacity = (a.k + std::max<int64_t>(a.k, 32) + vector - 1) / vector * vector;
    const int64_t step = Product::kTokenStep;
    const int64_t share = ((a.B + a.threads - 1) / a.threads + step - 1) / step * step;
    tokens = std::min(Product::max_tokens(a.D), std::max(share, step));
    while (tokens > step && List::bytes(tokens, capacity) > kListBytes) tokens -= step;
  }

  size_t workspace() const { return thread_bytes() * static_cast<size_t>(a.threads); }

  void run() const {
    const int64_t blocks = (a.B + tokens - 1) / tokens;
    if (blocks == 0) return;
    std::atomic<int64_t> next{0};
    on_threads(static_cast<int>(std::min<int64_t>(a.threads, blocks)), [&](int thread) {
      Product::enter_thread();
      for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
        select_block(block * tokens, static_cast<char*>(a.workspace) + thread * thread_bytes());
      }
      Product::leave_thread();
    });
  }

 private:
  static constexpr size_t kListBytes = 4 << 20;
  static_assert(Product::kLatents % 4 == 0 && Product::kGroup == kLanes<T>);

  const SelectTopkArgs& a;
  int64_t capacity, tokens;

  static constexpr size_t kScoresBytes = sizeof(T) * Product::kTokenStep * Product::kLatents;

  size_t packed_bytes() const {
    return aligned(static_cast<size_t>(tokens / Product::kTokenStep * Product::panel_bytes(a.D)));
  }
  size_t thread_bytes() const {
    return packed_bytes() + Product::scratch_bytes(a.D) + aligned(kScoresBytes) +
           2 * aligned(Product::kLatents * sizeof(T)) + List::bytes(tokens, capacity) +
           aligned(static_cast<size_t>(a.k) * sizeof(typename List::Entry));
  }

  void select_block(int64_t first, char* memory) const {
    const auto take = [&memory](size_t bytes) {
      char* piece = memory;
      memory += aligned(bytes);
      return piece;
    };
    const int64_t count = std::min(tokens, a.B - first);
    const int64_t step = Product::kTokenStep;
    const int64_t padded = (count + step - 1) / step * step;
    void* packed = take(packed_bytes());
    void* scratch = take(Product::scratch_bytes(a.D));
    T* scores = reinterpret_cast<T*>(take(kScoresBytes));
    T* bias = reinterpret_cast<T*>(take(Product::kLatents * sizeof(T)));
    T* scale = reinterpret_cast<T*>(take(Product::kLatents * sizeof(T)));
    List list(take(List::bytes(tokens, capacity)), tokens, capacity, a.k);
    auto* entries = reinterpret_cast<typename List::Entry*>(memory);

    const E* W = static_cast<const E*>(a.W);
    Product::pack(static_cast<const E*>(a.x) + first * a.D, count, padded, a.D, packed);
    list.reset(tokens);
    for (int64_t f = 0; f < a.F; f += Product::kLatents) {
      const int64_t latents = std::min<int64_t>(Product::kLatents, a.F - f);
      const auto* rows = Product::rows(W + f * a.D, latents, a.D, scratch);
      fill(bias, static_cast<const T*>(a.b), f, latents, T{0});
      if (kScaled) fill(scale, static_cast<const T*>(a.rank_scale), f, latents, T{1});
      // The next tile of W is fetched in equal shares while this one is multiplied.
      const char* ahead = reinterpret_cast<const char*>(W + (f + latents) * a.D);
      const int64_t next = std::min<int64_t>(Product::kLatents, a.F - f - latents);
      const int64_t share = next * a.D * static_cast<int64_t>(sizeof(E)) * step / padded;
      const char* panel = static_cast<const char*>(packed);
      for (int64_t token = 0; token < count; token += step) {
        Product::tile(panel, rows, latents, a.D, scores, ahead, share);
        scan(scores, bias, scale, f, latents, token, count, list);
        panel += Product::panel_bytes(a.D);
        ahead += share;
      }
    }
    T* values = static_cast<T*>(a.values) + first * a.k;
    int32_t* indices = a.indices + first * a.k;
    for (int64_t t = 0; t < count; ++t) {
      list.finish(t, entries, values + t * a.k, indices + t * a.k);
    }
  }

  static void fill(T* out, const T* from, int64_t f, int64_t latents, T missing) {
    for (int64_t i = 0; i < latents; ++i) out[i] = from ? from[f + i] : missing;
  }

  // Hands every score of one step of tokens that is not below its token's threshold to the token's
  // list. Four latents are tested by one branch; almost always nothing survives.
  void scan(const T* scores, const T* bias, const T* scale, int64_t f, int64_t latents,
            int64_t token, int64_t count, List& list) const {
    constexpr int kGroup = Product::kGroup;
    const int64_t end = std::min<int64_t>(count, token + Product::kTokenStep);
    for (; token < end; token += kGroup, scores += Product::kLatents * kGroup) {
      // Never wider than a group, so that nothing beyond a mask's own bits can pass.
      const uint32_t live = (1u << std::min<int64_t>(end - token, kGroup)) - 1;
      Vec<T> threshold = load_raw(list.thresholds + token);
      for (int64_t i = 0; i < latents; i += 4) {
        uint32_t mask[4], any = 0;
        SAE_UNROLL for (int u = 0; u < 4; ++u) {
          Vec<T> key = load_raw(scores + (i + u) * kGroup) + splat(bias[i + u]);
          if (kScaled) key = key * splat(scale[i + u]);
          mask[u] = survivors<T>(key, threshold) & live;
          any |= mask[u];
        }
        if (__builtin_expect(any == 0, 1)) continue;
        for (int u = 0; u < 4 && i + u < latents; ++u) {
          for (uint32_t left = mask[u]; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            const T h = scores[(i + u) * kGroup + lane] + bias[i + u] + T{0};
            list.push(token + lane, kScaled ? h * scale[i + u] : h, static_cast<int32_t>(f + i + u),
                      h);
          }
        }
        threshold = load_raw(list.thresholds + token);
      }
    }
  }
};

}  // namespace sae::SAE_ISA
