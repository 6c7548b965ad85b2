// select_topk: of each tile of scores a token keeps only the entries that can still win.
#pragma once

#include "sae_kernels/candidates.h"
#include "sae_kernels/encoder.h"

namespace sae::SAE_ISA {

template <class Product, bool kScaled>
class SelectTopk {
  using T = typename Product::T;
  using List = Candidates<T, kScaled>;
  using Entry = typename List::Entry;

 public:
  explicit SelectTopk(const SelectTopkArgs& args)
      : a(args), encoder{args.x, args.W, args.b, args.B, args.D, args.F, args.threads} {
    // Longer lists are cut less often, shorter ones tighten the threshold earlier.
    const int64_t vector = kLanes<Key<T>>;
    capacity = (a.k + std::max<int64_t>(a.k, 32) + vector - 1) / vector * vector;
    int64_t& tokens = encoder.tokens;
    const int64_t step = Product::kTokenStep;
    while (tokens > step && List::bytes(tokens, capacity) > kListBytes) tokens -= step;
  }

  size_t workspace() const {
    return (encoder.thread_bytes() + sink_bytes()) * static_cast<size_t>(a.threads);
  }

  void run() const {
    encoder.run(a.workspace, sink_bytes(), [&](Carver& carver) {
      T* scale = carver.template take<T>(Product::kLatents * sizeof(T));
      char* lists = carver.take(List::bytes(encoder.tokens, capacity));
      Entry* entries = carver.template take<Entry>(static_cast<size_t>(a.k) * sizeof(Entry));
      return Sink{a, scale, List(lists, encoder.tokens, capacity, a.k), entries};
    });
  }

 private:
  static constexpr size_t kListBytes = 4 << 20;

  const SelectTopkArgs& a;
  Encoder<Product> encoder;
  int64_t capacity;

  size_t sink_bytes() const {
    return aligned(Product::kLatents * sizeof(T)) + aligned(List::bytes(encoder.tokens, capacity)) +
           aligned(static_cast<size_t>(a.k) * sizeof(Entry));
  }

  struct Sink {
    const SelectTopkArgs& a;
    T* scale;
    List list;
    Entry* entries;

    void start_block(int64_t, int64_t count) {
      list.reset((count + Product::kTokenStep - 1) / Product::kTokenStep * Product::kTokenStep);
    }

    void start_tile(int64_t f, int64_t latents) {
      if (kScaled) Encoder<Product>::fill(scale, a.rank_scale, f, latents, T{1});
    }

    void scan(const T* scores, const T* bias, int64_t f, int64_t latents, int64_t token,
              int64_t count) {
      scan_step<Product>(
          scores, latents, token, count,
          [&](int64_t first) SAE_INLINE_LAMBDA { return load_raw(list.thresholds + first); },
          [&](const T* at, int64_t i, Vec<T> threshold) SAE_INLINE_LAMBDA {
            Vec<T> key = load_raw(at) + splat(bias[i]);
            if (kScaled) key = key * splat(scale[i]);
            return survivors<T>(key, threshold);
          },
          [&](int64_t t, int64_t i, T score) SAE_INLINE_LAMBDA {
            const T h = score + bias[i] + T{0};
            list.push(t, kScaled ? h * scale[i] : h, static_cast<int32_t>(f + i), h);
          });
    }

    void finish_block(int64_t first, int64_t count) {
      T* values = static_cast<T*>(a.values) + first * a.k;
      int32_t* indices = a.indices + first * a.k;
      for (int64_t t = 0; t < count; ++t) {
        list.finish(t, entries, values + t * a.k, indices + t * a.k);
      }
    }
  };
};

}  // namespace sae::SAE_ISA
