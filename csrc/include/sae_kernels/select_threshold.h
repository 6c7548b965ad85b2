// select_threshold: every score above its latent's bound, and how many there are is known only
// when all have been computed. Each block of tokens notes what it finds; a second, cheap pass puts
// the entries in the order of tokens once the caller has made room for them.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "sae_kernels/encoder.h"
#include "sae_kernels/screen.h"

namespace sae::SAE_ISA {

template <class T>
class Found final : public Selection {
 public:
  struct Entry {
    int32_t token, latent;
    T value;
  };
  struct Block {
    int64_t first = 0;
    std::vector<Entry> entries;  // a token's own are in ascending latent order
  };
  // A type of this ISA's namespace, so that the vector's code is this ISA's alone.
  struct Count {
    int32_t n = 0;
  };
  std::vector<Block> blocks;
  std::vector<Count> counts;  // by token
  int threads = 1;

  int64_t count() const override {
    int64_t total = 0;
    for (const Block& block : blocks) total += static_cast<int64_t>(block.entries.size());
    return total;
  }

  void write(void* values, int32_t* indices, int32_t* offsets) const override {
    offsets[0] = 0;
    std::vector<Count> places(counts.size());
    for (size_t t = 0; t < counts.size(); ++t) {
      places[t].n = offsets[t];
      offsets[t + 1] = offsets[t] + counts[t].n;
    }
    parallel_for(static_cast<int64_t>(blocks.size()), 1, threads, [&](int64_t i, int64_t, int) {
      const Block& block = blocks[static_cast<size_t>(i)];
      for (const Entry& entry : block.entries) {
        const int32_t place = places[static_cast<size_t>(block.first + entry.token)].n++;
        static_cast<T*>(values)[place] = with_one_nan(entry.value);
        indices[place] = entry.latent;
      }
    });
  }
};

template <class Product>
class SelectThreshold {
  using T = typename Product::T;
  using List = Found<T>;

 public:
  explicit SelectThreshold(const SelectThresholdArgs& args)
      : a(args),
        encoder{args.x, args.W, args.b, args.B, args.D, args.F, args.threads},
        screened(Screen::serves<Product>(args.screening, args.D)) {}

  size_t workspace() const {
    return (encoder.thread_bytes() + sink_bytes()) * static_cast<size_t>(a.threads);
  }

  std::unique_ptr<Selection> run() const {
    auto found = std::make_unique<List>();
    found->blocks.resize(static_cast<size_t>(encoder.blocks()));
    found->counts.resize(static_cast<size_t>(a.B));
    found->threads = a.threads;
    encoder.run(a.workspace, sink_bytes(), [&](Carver& carver) {
      T* bound = carver.template take<T>(kBoundBytes);
      std::optional<Screen> screen;
      if (screened) screen.emplace(a.screening, carver, encoder.tokens, a.D);
      return Sink{a, bound, *found, screen};
    });
    return found;
  }

 private:
  static constexpr size_t kBoundBytes = aligned(Product::kLatents * sizeof(T));
  static constexpr size_t kExpected = 48;  // entries a token; a longer list grows

  const SelectThresholdArgs& a;
  Encoder<Product> encoder;
  bool screened;

  size_t sink_bytes() const {
    return kBoundBytes + (screened ? Screen::bytes(encoder.tokens, a.D) : 0);
  }

  struct Sink {
    const SelectThresholdArgs& a;
    T* bound;
    List& found;
    std::optional<Screen> screen;
    typename List::Block* block = nullptr;
    int64_t seen = 0;  // latents of the block's tiles so far

    void start_block(int64_t number, const Rows& rows, int64_t count) {
      seen = 0;
      if (screen) screen->start_block(static_cast<const float*>(a.x), rows, count);
      block = &found.blocks[static_cast<size_t>(number)];
      block->first = rows.first;
      block->entries.reserve(static_cast<size_t>(count) * kExpected);
    }

    bool start_tile(int64_t f, int64_t latents, const T* bias) {
      seen += latents;
      Encoder<Product>::fill(bound, a.bounds, f, latents, T{0});
      if constexpr (Screen::kServes<Product>) {
        if (screen) {
          return !screen->tile(
              static_cast<const float*>(a.W) + f * a.D, latents, seen, none, tests(bias),
              [&](int64_t, int64_t i, T score)
                  SAE_INLINE_LAMBDA { return !(score + bias[i] <= bound[i]); },
              adds(bias, f));
        }
      }
      return true;
    }

    static int none(int64_t) { return 0; }  // nothing to compare with but the latents' own bounds
    auto tests(const T* bias) {
      return [this, bias](const T* at, int64_t i, int) SAE_INLINE_LAMBDA {
        return survivors<T, true>(load_raw(at) + splat(bias[i]), splat(bound[i]));
      };
    }
    auto adds(const T* bias, int64_t f) {
      return [this, bias, f](int64_t t, int64_t i, T score) SAE_INLINE_LAMBDA {
        block->entries.push_back(
            {static_cast<int32_t>(t), static_cast<int32_t>(f + i), score + bias[i] + T{0}});
      };
    }

    void scan(const T* scores, const T* bias, int64_t f, int64_t latents, int64_t token,
              int64_t count) {
      scan_step<Product>(scores, latents, token, count, none, tests(bias), adds(bias, f));
    }

    void finish_block(const Rows& rows, int64_t) {
      for (const auto& entry : block->entries) {
        ++found.counts[static_cast<size_t>(rows.first + entry.token)].n;
      }
    }
  };
};

}  // namespace sae::SAE_ISA
