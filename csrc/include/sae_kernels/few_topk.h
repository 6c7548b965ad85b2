// select_topk for few tokens: every thread keeps the k best of the latents it came by, and the best
// of all of these are the best.
#pragma once

#include "sae_kernels/candidates.h"
#include "sae_kernels/few_tokens.h"

namespace sae::SAE_ISA {

template <class E, RankedBy kBy>
class FewTopk {
  static constexpr bool kScaled = kBy != RankedBy::score;
  using List = Candidates<float, kScaled>;
  using Entry = typename List::Entry;

 public:
  explicit FewTopk(const SelectTopkArgs& args)
      : a(args),
        encoder(a, a.routes),
        limit(List::whole_vectors(a.k + std::max<int64_t>(a.k, 32))),
        list_bytes(aligned(List::bytes(a.B, limit))),
        merge_bytes(aligned(static_cast<size_t>(encoder.tiles.threads() * a.k) * sizeof(Entry))) {}

  size_t workspace() const { return bytes_before_seen() + aligned(static_cast<size_t>(a.B)); }

  bool run() const {
    char* memory = static_cast<char*>(a.workspace);
    if (a.routes.tokens && !each_token_once(a.routes, a.B, memory + bytes_before_seen())) {
      return false;
    }
    char* lists = memory + encoder.workspace();
    const auto list = [&](int64_t thread) {
      return List(lists + static_cast<size_t>(thread) * list_bytes, a.B, limit, limit, a.k);
    };
    encoder.run(memory, [&](int thread) {
      Sink sink{a, list(thread)};
      sink.list.reset(a.B);
      return sink;
    });
    const Rows rows = {a.routes.tokens, 0};
    char* merged = lists + static_cast<size_t>(encoder.tiles.threads()) * list_bytes;
    parallel_for(a.B, 1, encoder.tiles.threads(), [&](int64_t t, int64_t, int thread) {
      Entry* entries = reinterpret_cast<Entry*>(merged + static_cast<size_t>(thread) * merge_bytes);
      Entry* end = entries;
      for (int64_t i = 0; i < encoder.tiles.threads(); ++i) end = list(i).take(t, end);
      std::nth_element(entries, entries + a.k - 1, end);
      const int64_t at = rows[t] * a.k;
      List::write(entries, a.k, static_cast<float*>(a.values) + at, a.indices + at);
    });
    return true;
  }

 private:
  const SelectTopkArgs& a;
  FewTokens<E> encoder;
  int64_t limit;
  size_t list_bytes, merge_bytes;

  size_t bytes_before_seen() const {
    return encoder.workspace() +
           static_cast<size_t>(encoder.tiles.threads()) * (list_bytes + merge_bytes);
  }

  struct Sink {
    const SelectTopkArgs& a;
    List list;
    int64_t first = 0;
    Vec<float> scale{};

    void start_tile(int64_t f, int64_t latents) {
      first = f;
      if (kScaled) scale = a.rank_scale ? of_tile(a.rank_scale, f, latents) : splat(1.0f);
    }

    void scan(int64_t token, Vec<float> h, uint32_t live) {
      const Vec<float> key = rank_key<kBy>(h, scale);
      uint32_t passed = survivors<float>(key, splat(list.thresholds[token])) & live;
      for (; passed; passed &= passed - 1) {
        const int lane = __builtin_ctz(passed);
        list.push(token, key[lane], static_cast<int32_t>(first + lane), h[lane]);
      }
    }
  };
};

}  // namespace sae::SAE_ISA
