// select_threshold for few tokens: threads note what they find tile by tile, and tiles are put in
// order when all have been seen.
#pragma once

#include <memory>
#include <vector>

#include "sae_kernels/few_narrow.h"
#include "sae_kernels/few_tokens.h"
#include "sae_kernels/select_threshold.h"

namespace sae::SAE_ISA {

// The encoder is FewTokens, or FewNarrow: then what it lets through is scored in the end.
template <class E, class Few>
class FewThreshold {
  using List = Found<float>;
  using Entry = typename List::Entry;

 public:
  explicit FewThreshold(const SelectThresholdArgs& args) : a(args), encoder(a) {}

  size_t workspace() const { return encoder.workspace(); }

  std::unique_ptr<Selection> run() const {
    std::vector<Notes> notes(static_cast<size_t>(encoder.tiles.threads()));
    encoder.run(a.workspace,
                [&](int thread) { return Sink{a, notes[static_cast<size_t>(thread)]}; });
    std::vector<Tile> tiles;
    size_t total = 0;
    for (Notes& own : notes) {
      total += own.entries.size();
      for (size_t i = 0; i < own.tiles.size(); ++i) {
        const bool is_last = i + 1 == own.tiles.size();
        own.tiles[i].end = is_last ? own.entries.size() : own.tiles[i + 1].begin;
        own.tiles[i].entries = own.entries.data();
        tiles.push_back(own.tiles[i]);
      }
    }
    std::sort(tiles.begin(), tiles.end());
    auto found = std::make_unique<List>();
    found->blocks.resize(1);
    found->counts.resize(static_cast<size_t>(a.B));
    auto& entries = found->blocks[0].entries;
    entries.reserve(total);
    for (const Tile& tile : tiles) {
      entries.insert(entries.end(), tile.entries + tile.begin, tile.entries + tile.end);
    }
    if (!Few::kExact) score(entries);
    for (const Entry& entry : entries) ++found->counts[static_cast<size_t>(entry.token)].n;
    return found;
  }

 private:
  const SelectThresholdArgs& a;
  Few encoder;

  struct Tile {
    int64_t f;
    size_t begin, end;  // of the thread's entries
    const Entry* entries;
    bool operator<(const Tile& other) const { return f < other.f; }
  };
  struct alignas(kAlign) Notes {
    std::vector<Entry> entries;
    std::vector<Tile> tiles;
  };

  // Scores the entries and leaves those that are above their bound.
  void score(std::vector<Entry>& entries) const {
    const float *b = static_cast<const float*>(a.b), *bounds = static_cast<const float*>(a.bounds);
    const int64_t n = static_cast<int64_t>(entries.size());
    parallel_for(n, kLanes<float>, encoder.tiles.threads(), [&](int64_t begin, int64_t end, int) {
      Entry* own = entries.data() + begin;
      score_pairs<E>(
          end - begin, a.D,
          [&](int64_t i) {
            return PairOfRows<E>{static_cast<const E*>(a.x) + own[i].token * a.D,
                                 static_cast<const E*>(a.W) + own[i].latent * a.D};
          },
          [&](int64_t i, float dot) { own[i].value = dot + (b ? b[own[i].latent] : 0.0f) + 0.0f; });
    });
    entries.erase(std::remove_if(entries.begin(), entries.end(),
                                 [=](const Entry& own) { return own.value <= bounds[own.latent]; }),
                  entries.end());
  }

  struct Sink {
    const SelectThresholdArgs& a;
    Notes& notes;
    int64_t first = 0;
    Vec<float> bound{};

    void start_tile(int64_t f, int64_t latents) {
      first = f;
      bound = of_tile(a.bounds, f, latents);
      notes.tiles.push_back({f, notes.entries.size(), 0, nullptr});
    }

    void scan(int64_t token, Vec<float> h, uint32_t live) {
      for (uint32_t passed = survivors<float, true>(h, bound) & live; passed;
           passed &= passed - 1) {
        const int lane = __builtin_ctz(passed);
        notes.entries.push_back(
            {static_cast<int32_t>(token), static_cast<int32_t>(first + lane), h[lane]});
      }
    }
    void scan(int64_t token, Vec<float>, Vec<float> most, uint32_t live) {
      scan(token, most, live);
    }
  };
};

}  // namespace sae::SAE_ISA
