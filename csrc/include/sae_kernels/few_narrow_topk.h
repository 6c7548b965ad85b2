// select_topk for few tokens from rows of W in 8 bits: every thread keeps the latents that may be
// among the k best by the bounds it came by, and those that are left in the end are scored.
#pragma once

#include <vector>

#include "sae_kernels/candidates.h"
#include "sae_kernels/few_narrow.h"

namespace sae::SAE_ISA {

template <class E, bool kScaled>
class FewNarrowTopk {
  using List = Candidates<float, kScaled>;
  using Entry = typename List::Entry;

  // A latent whose key is within bounds; once scored it is its entry's, and they are one.
  struct Suspect {
    Key<float> least, most;
    bool scored;
    Entry entry;
  };
  using Suspects = std::vector<Suspect>;

 public:
  explicit FewNarrowTopk(const SelectTopkArgs& args)
      : a(args), encoder(a, a.routes), limit(std::max<int64_t>(8 * a.k, 128)) {}

  size_t workspace() const { return encoder.workspace() + aligned(static_cast<size_t>(a.B)); }

  bool run() const {
    char* memory = static_cast<char*>(a.workspace);
    if (a.routes.tokens && !each_token_once(a.routes, a.B, memory + encoder.workspace())) {
      return false;
    }
    const int threads = encoder.tiles.threads();
    std::vector<Thread> found(static_cast<size_t>(threads));
    encoder.run(memory, [&](int thread) {
      Thread& own = found[static_cast<size_t>(thread)];
      own.suspects.resize(static_cast<size_t>(a.B));
      own.thresholds.assign(static_cast<size_t>(a.B), {-std::numeric_limits<float>::infinity()});
      return Sink{*this, own};
    });
    // Of all threads' suspects, those that may still be among the k best.
    std::vector<Suspects> lists(static_cast<size_t>(a.B));
    std::vector<Place> places;
    for (int64_t t = 0; t < a.B; ++t) {
      Suspects& list = lists[static_cast<size_t>(t)];
      for (const Thread& thread : found) {
        const Suspects& own = thread.suspects[static_cast<size_t>(t)];
        list.insert(list.end(), own.begin(), own.end());
      }
      cut(list);
      for (Suspect& suspect : list) {
        if (!suspect.scored) places.push_back({t, &suspect});
      }
    }
    const int64_t n = static_cast<int64_t>(places.size());
    parallel_for(n, kLanes<float>, threads, [&](int64_t begin, int64_t end, int) {
      score(places.data() + begin, end - begin);
    });
    parallel_for(a.B, 1, threads, [&](int64_t t, int64_t, int) {
      std::vector<Entry> entries;
      for (const Suspect& suspect : lists[static_cast<size_t>(t)]) entries.push_back(suspect.entry);
      std::nth_element(entries.begin(), entries.begin() + (a.k - 1), entries.end());
      const int64_t at = encoder.tiles.rows()[t] * a.k;
      List::write(entries.data(), a.k, static_cast<float*>(a.values) + at, a.indices + at);
    });
    return true;
  }

 private:
  const SelectTopkArgs& a;
  FewNarrow<E> encoder;
  int64_t limit;  // of a list

  struct Threshold {
    float value;
  };
  struct alignas(kAlign) Thread {
    std::vector<Suspects> suspects;  // by token
    std::vector<Threshold> thresholds;
  };
  struct Place {
    int64_t token;
    Suspect* suspect;
  };

  void score(const Place* places, int64_t n) const {
    score_pairs<E>(
        n, a.D,
        [&](int64_t i) {
          const E* W = static_cast<const E*>(a.W);
          return PairOfRows<E>{encoder.x + encoder.tiles.rows()[places[i].token] * a.D,
                               W + places[i].suspect->entry.latent * a.D};
        },
        [&](int64_t i, float dot) {
          Suspect& own = *places[i].suspect;
          const int32_t f = own.entry.latent;
          const float h = dot + (a.b ? static_cast<const float*>(a.b)[f] : 0.0f) + 0.0f;
          const float scale = kScaled ? static_cast<const float*>(a.rank_scale)[f] : 1.0f;
          own.entry.key = own.least = own.most = ordered_key(kScaled ? h * scale : h);
          own.entry.value = with_one_nan(h);
          own.scored = true;
        });
  }

  // Leaves out what is below k others for certain; returns the key that all others reach.
  Key<float> cut(Suspects& list) const {
    if (static_cast<int64_t>(list.size()) < a.k) return 0;
    const auto kth = list.begin() + (a.k - 1);
    std::nth_element(list.begin(), kth, list.end(), [](const Suspect& one, const Suspect& other) {
      return one.least > other.least;
    });
    const Key<float> reached = kth->least;
    list.erase(std::remove_if(list.begin(), list.end(),
                              [=](const Suspect& own) { return own.most < reached; }),
               list.end());
    return reached;
  }

  // Makes room in a full list: by the bounds, or if these do not tell enough by scores.
  __attribute__((noinline)) float shorten(int64_t token, Suspects& list) const {
    Key<float> reached = cut(list);
    if (static_cast<int64_t>(list.size()) > limit / 2) {
      std::vector<Place> places;
      for (Suspect& own : list) {
        if (!own.scored) places.push_back({token, &own});
      }
      score(places.data(), static_cast<int64_t>(places.size()));
      const auto kth = list.begin() + (a.k - 1);
      std::nth_element(list.begin(), kth, list.end(), [](const Suspect& one, const Suspect& other) {
        return one.entry < other.entry;
      });
      reached = kth->least;
      list.resize(static_cast<size_t>(a.k));
    }
    // Beside NaN nothing but NaN could matter.
    return reached == ~Key<float>{0} ? std::numeric_limits<float>::infinity()
                                     : value_of_key<float>(reached);
  }

  struct Sink {
    const FewNarrowTopk& select;
    Thread& own;
    int64_t first = 0;
    Vec<float> scale{};

    void start_tile(int64_t f, int64_t latents) {
      first = f;
      if (kScaled) scale = of_tile(select.a.rank_scale, f, latents);
    }

    void scan(int64_t token, Vec<float> least, Vec<float> most, uint32_t live) {
      if (kScaled) {  // by a negative number the one becomes the other
        const Vec<float> one = least * scale, other = most * scale;
        least = one < other ? one : other;
        most = one < other ? other : one;
        most = other == other ? most : other;
      }
      float& threshold = own.thresholds[static_cast<size_t>(token)].value;
      uint32_t passed = survivors<float>(most, splat(threshold)) & live;
      if (__builtin_expect(passed == 0, 1)) return;
      Suspects& list = own.suspects[static_cast<size_t>(token)];
      for (; passed; passed &= passed - 1) {
        const int lane = __builtin_ctz(passed);
        const float low = least[lane];
        // What is not bounded at all is NaN here: it may be anything.
        list.push_back({low == low ? ordered_key(low) : 0,
                        ordered_key(most[lane]),
                        false,
                        {0, static_cast<int32_t>(first + lane), 0}});
      }
      if (static_cast<int64_t>(list.size()) >= select.limit) {
        threshold = select.shorten(token, list);
      }
    }
  };
};

}  // namespace sae::SAE_ISA
