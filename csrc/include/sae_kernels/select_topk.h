// select_topk: of each tile of scores a token keeps only the entries that can still win.
#pragma once

#include <cmath>
#include <optional>

#include "sae_kernels/candidates.h"
#include "sae_kernels/encoder.h"
#include "sae_kernels/screen.h"

namespace sae::SAE_ISA {

template <class Product, RankedBy kBy>
class SelectTopk {
  static constexpr bool kScaled = kBy != RankedBy::score;
  using T = typename Product::T;
  using List = Candidates<T, kScaled>;
  using Entry = typename List::Entry;

 public:
  explicit SelectTopk(const SelectTopkArgs& args)
      : a(args),
        encoder{args.x, args.W, args.b, args.B, args.D, args.F, args.threads, args.routes},
        screened(kBy != RankedBy::magnitude && Screen::serves<Product>(args.screening, args.D)) {
    // Longer lists are cut less often, shorter ones tighten the threshold earlier. At first, when
    // nearly all would pass, longer ones are filled without comparing.
    limit = List::whole_vectors(a.k + std::max<int64_t>(a.k, 32));
    capacity = std::max(List::whole_vectors(limit),
                        List::whole_vectors(std::min<int64_t>(8 * a.k, kFilled)));
    int64_t& tokens = encoder.tokens;
    const int64_t step = Product::kTokenStep;
    if (screened) {
      tokens = encoder.block_tokens(Screen::max_tokens(a.D));
    }
    while (tokens > step && List::bytes(tokens, capacity) > kListBytes) tokens -= step;
  }

  size_t workspace() const { return lists_bytes() + aligned(static_cast<size_t>(a.B)); }

  bool run() const {
    if (a.routes.tokens &&
        !each_token_once(a.routes, a.B, static_cast<char*>(a.workspace) + lists_bytes())) {
      return false;
    }
    encoder.run(a.workspace, sink_bytes(), [&](Carver& carver) {
      T* scale = carver.template take<T>(Product::kLatents * sizeof(T));
      char* lists = carver.take(List::bytes(encoder.tokens, capacity));
      Entry* entries = carver.template take<Entry>(static_cast<size_t>(a.k) * sizeof(Entry));
      std::optional<Screen> screen;
      if (screened) screen.emplace(a.screening, carver, encoder.tokens, a.D);
      return Sink{a,       limit, scale, List(lists, encoder.tokens, capacity, limit, a.k),
                  entries, screen};
    });
    return true;
  }

 private:
  static constexpr size_t kListBytes = 4 << 20;
  static constexpr int64_t kFilled = 272;  // no power of two, by which lists would share sets

  const SelectTopkArgs& a;
  Encoder<Product> encoder;
  bool screened;
  int64_t limit, capacity;

  size_t lists_bytes() const {
    return (encoder.thread_bytes() + sink_bytes()) * static_cast<size_t>(a.threads);
  }

  size_t sink_bytes() const {
    return aligned(Product::kLatents * sizeof(T)) + aligned(List::bytes(encoder.tokens, capacity)) +
           aligned(static_cast<size_t>(a.k) * sizeof(Entry)) +
           (screened ? Screen::bytes(encoder.tokens, a.D) : 0);
  }

  struct Sink {
    const SelectTopkArgs& a;
    int64_t limit;  // of lists, where tiles are multiplied
    T* scale;
    List list;
    Entry* entries;
    std::optional<Screen> screen;
    int64_t seen = 0;  // latents of the block's tiles so far
    bool floored = false, fills = false;

    void start_block(int64_t, const Rows& rows, int64_t count) {
      seen = 0;
      if (screen) screen->start_block(static_cast<const float*>(a.x), rows, count);
      list.reset((count + Product::kTokenStep - 1) / Product::kTokenStep * Product::kTokenStep);
      const T* floor = kBy == RankedBy::score ? static_cast<const T*>(a.floor) : nullptr;
      floored = floor;
      for (int64_t t = 0; floored && t < count; ++t) floored = std::isfinite(floor[rows[t]]);
      for (int64_t t = 0; floored && t < count; ++t) list.start_below(t, floor[rows[t]]);
    }

    bool start_tile(int64_t f, int64_t latents, const T* bias) {
      seen += latents;
      fills = !floored && seen <= list.capacity;
      if (kScaled) Encoder<Product>::fill(scale, a.rank_scale, f, latents, T{1});
      if constexpr (Screen::kServes<Product>) {
        if (screen && !fills) {
          // A score that is computed alone is dear.
          list.limit = a.k + std::max<int64_t>(a.k / 4, 8);
          if (screen_tile(f, latents, bias)) return false;
          list.limit = limit;
        }
      }
      return true;
    }

    // A larger score has a larger key only if it is scaled by a positive number.
    bool screen_tile(int64_t f, int64_t latents, const T* bias) {
      for (int64_t i = 0; kScaled && i < latents; ++i) {
        if (!(scale[i] >= 0)) return false;
      }
      return screen->tile(
          static_cast<const float*>(a.W) + f * a.D, latents, seen, thresholds(), tests(bias),
          [&](int64_t t, int64_t i, T score)
              SAE_INLINE_LAMBDA { return !(key_of(score + bias[i], i) < list.thresholds[t]); },
          pushes(bias, f));
    }

    T key_of(T h, int64_t i) const { return rank_key<kBy>(h, kScaled ? scale[i] : T{1}); }

    auto thresholds() {
      return [this](int64_t token) SAE_INLINE_LAMBDA { return load_raw(list.thresholds + token); };
    }
    auto tests(const T* bias) {
      return [this, bias](const T* at, int64_t i, Vec<T> threshold) SAE_INLINE_LAMBDA {
        const Vec<T> by = kScaled ? splat(scale[i]) : Vec<T>{};
        return survivors<T>(rank_key<kBy>(load_raw(at) + splat(bias[i]), by), threshold);
      };
    }
    auto pushes(const T* bias, int64_t f) {
      return [this, bias, f](int64_t t, int64_t i, T score) SAE_INLINE_LAMBDA {
        const T h = score + bias[i] + T{0};
        list.push(t, key_of(h, i), static_cast<int32_t>(f + i), h);
      };
    }

    void scan(const T* scores, const T* bias, int64_t f, int64_t latents, int64_t token,
              int64_t count) {
      if (fills) return fill(scores, bias, f, latents, token, count);
      scan_step<Product>(scores, latents, token, count, thresholds(), tests(bias), pushes(bias, f));
    }

    // As long as lists have room for a whole tile nothing has to be compared.
    void fill(const T* scores, const T* bias, int64_t f, int64_t latents, int64_t token,
              int64_t count) {
      constexpr int kGroup = Product::kGroup;
      const int64_t end = std::min<int64_t>(count, token + Product::kTokenStep);
      for (int64_t t = token; t < end; ++t) {
        const int64_t place = t - token;
        const T* own = scores + place / kGroup * Product::kLatents * kGroup + place % kGroup;
        int64_t i = 0;
        for (; i + kGroup <= latents; i += kGroup) {
          const Vec<T> h = load_strided<kGroup>(own + i * kGroup) + load_raw(bias + i) + T{0};
          const Vec<T> by = kScaled ? load_raw(scale + i) : Vec<T>{};
          list.put_vector(t, i, rank_key<kBy>(h, by), static_cast<int32_t>(f + i), h);
        }
        for (; i < latents; ++i) {
          const T h = own[i * kGroup] + bias[i] + T{0};
          list.put(t, i, key_of(h, i), static_cast<int32_t>(f + i), h);
        }
        list.counts[t] += static_cast<int32_t>(latents);
        if (seen + Product::kLatents > list.capacity) list.compact(t);
      }
    }

    void finish_block(const Rows& rows, int64_t count) {
      for (int64_t t = 0; t < count; ++t) {
        const int64_t at = rows[t] * a.k;
        T* values = static_cast<T*>(a.values) + at;
        int32_t* indices = a.indices + at;
        list.finish(t, entries, values, indices);
        for (int64_t j = 0; floored && j < a.k; ++j) {
          if (indices[j] < 0) values[j] = -std::numeric_limits<T>::infinity(), indices[j] = 0;
        }
      }
    }
  };
};

}  // namespace sae::SAE_ISA
