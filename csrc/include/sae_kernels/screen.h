// The screen of the fp32 encoder: of each tile of latents only pairs of a token and a latent are
// scored whose upper bound by the narrow product can still win. What it finds is bit for bit what
// the fp32 product would have found; where too many pairs pass, the tile is left to that product.
#pragma once

#include "sae_kernels/encoder.h"
#include "sae_kernels/product_int8.h"
#include "sae_kernels/rescore.h"

namespace sae::SAE_ISA {

class Screen {
  using Wide = FmaProduct<float>;
  static constexpr int kLatents = Wide::kLatents, kTokenStep = Wide::kTokenStep;

 public:
  template <class Product>
  static constexpr bool kServes = std::is_same<Product, Wide>::value;
  // Whether rows of D can be screened here at all.
  template <class Product>
  static bool serves(int64_t D) {
    return kServes<Product> && D <= kNarrowWidth && Int8Product::runs();
  }

  static int64_t max_tokens(int64_t D) {
    const int64_t fit = kPackedBytes / D / kTokenStep;
    return kTokenStep * std::min<int64_t>(std::max<int64_t>(fit, 1), 512 / kTokenStep);
  }

  static size_t bytes(int64_t tokens, int64_t D) {
    return packed_bytes(tokens, D) + narrow_bytes(D) + aligned(kBoundsBytes) +
           aligned(passed_bytes(tokens)) + aligned(short_bytes(tokens, D)) +
           aligned(static_cast<size_t>(tokens) * sizeof(Short));
  }

  Screen(Carver& carver, int64_t tokens_, int64_t D_)
      : tokens(tokens_),
        D(D_),
        packed(carver.take(packed_bytes(tokens, D))),
        narrow(carver.take<int8_t>(narrow_bytes(D))),
        bounds(carver.take<float>(kBoundsBytes)),
        passed(carver.take<uint16_t>(passed_bytes(tokens))),
        short_rows(carver.take<int16_t>(short_bytes(tokens, D))),
        shorts(carver.take<Short>(static_cast<size_t>(tokens) * sizeof(Short))) {}

  void start_block(const float* x_, const Rows& rows_, int64_t count_) {
    x = x_, rows = rows_, count = count_;
    resume = pack() ? 0 : kNever;
  }

  // Calls visit(token, i, score) for every score of the tile that may pass, those of a token by
  // ascending latent; or for none and returns false: then the tile has to be multiplied in fp32.
  // renew and test are those of scan_step; passes(token, i, score) tests one.
  template <class Renew, class Test, class Passes, class Visit>
  bool tile(const float* W, int64_t latents, int64_t seen, const Renew& renew, const Test& test,
            const Passes& passes, const Visit& visit) {
    if (seen < resume || !narrow_tile(W, latents)) return false;
    std::fill(passes_of, passes_of + latents, 0);
    const char* panel = packed;
    int64_t found = 0;
    // The next tile is fetched in equal shares while this one is multiplied.
    const char* ahead = reinterpret_cast<const char*>(W + latents * D);
    const int64_t share = latents * D * static_cast<int64_t>(sizeof(float)) * kTokenStep / count;
    for (int64_t token = 0; token < count; token += kTokenStep) {
      Int8Product::tile(panel, latent, latents, D, bounds, ahead, share);
      ahead += share;
      panel += Int8Product::panel_bytes(D);
      scan_step<Wide>(bounds, latents, token, count, renew, test,
                      [&](int64_t t, int64_t i, float) SAE_INLINE_LAMBDA {
                        passed[i * tokens + passes_of[i]++] = static_cast<uint16_t>(t);
                        ++found;
                      });
      if (too_many(found, latents * std::min(count, token + kTokenStep), seen)) return false;
    }
    score(W, latents, passes, visit);
    return true;
  }

 private:
  static constexpr size_t kBoundsBytes = sizeof(float) * kTokenStep * kLatents;
  static constexpr int64_t kPackedBytes = 1 << 19;  // of L2, for the narrow tokens of a block
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  static constexpr int64_t kOneOf = 12;  // of so many pairs one may pass

  // A token in 16 bits.
  struct Short {
    float scale, length, error;
  };

  int64_t tokens, D;
  char* packed;
  int8_t* narrow;
  float* bounds;
  uint16_t* passed;     // [kLatents, tokens]
  int16_t* short_rows;  // [tokens, narrow_stride(D)]
  Short* shorts;        // [tokens]
  int32_t passes_of[kLatents];
  Int8Product::Latent latent[kLatents];
  float length[kLatents];
  const float* x = nullptr;
  Rows rows{};
  int64_t count = 0, resume = 0;

  static size_t packed_bytes(int64_t tokens, int64_t D) {
    return aligned(
        static_cast<size_t>((tokens + kTokenStep - 1) / kTokenStep * Int8Product::panel_bytes(D)));
  }
  static size_t narrow_bytes(int64_t D) {
    return aligned(static_cast<size_t>(kLatents * narrow_stride(D)));
  }
  static size_t passed_bytes(int64_t tokens) {
    return static_cast<size_t>(kLatents * tokens) * sizeof(uint16_t);
  }

  static size_t short_bytes(int64_t tokens, int64_t D) {
    return static_cast<size_t>(tokens * narrow_stride(D)) * sizeof(int16_t);
  }

  // Whether all tokens of the block can be screened.
  bool pack() {
    for (int64_t t = 0; t < count; ++t) {
      const float* row = x + rows[t] * D;
      NarrowRow eight, sixteen;
      if (!narrow_row(row, D, narrow, eight)) return false;
      narrow_row(row, D, short_rows + t * narrow_stride(D), sixteen);
      Int8Product::pack(narrow, eight, t, D, packed);
      shorts[t] = {sixteen.scale, sixteen.length(), sixteen.error};
    }
    return true;
  }

  // A bound on the rounding of a sum of D products and of a few operations more, by its terms' sum.
  float rounding() const { return static_cast<float>(D + 64) * 1.01f * 0x1p-24f; }

  bool narrow_tile(const float* W, int64_t latents) {
    for (int64_t i = 0; i < latents; ++i) {
      int8_t* q = narrow + i * narrow_stride(D);
      NarrowRow row;
      if (!narrow_row(W + i * D, D, q, row)) return false;
      length[i] = row.length();
      latent[i] = {q, -128 * row.sum, row.scale, row.narrow, row.error + rounding() * row.length()};
    }
    return true;
  }

  // Most often because thresholds are low at first. The share that passes falls as one over the
  // latents seen, so it says when to try again.
  bool too_many(int64_t found, int64_t pairs, int64_t seen) {
    if (found * kOneOf <= pairs) return false;
    const int64_t share = found * kOneOf * 8 / pairs;  // in eighths of what may pass
    resume = seen * std::min<int64_t>(std::max<int64_t>(share, 9), 32) / 8;
    return true;
  }

  // Pairs that wait for their scores.
  template <class X, int kMost>
  struct Pairs {
    const X* x[kMost];
    const float* w[kMost];
    int64_t token[kMost], i[kMost];
    int n = 0;

    void add(const X* x_row, const float* w_row, int64_t t, int64_t latent) {
      x[n] = x_row, w[n] = w_row, token[n] = t, i[n++] = latent;
    }
    // The places that are left are filled with what is there.
    void fill() {
      for (int j = n; j < kMost; ++j) x[j] = x[0], w[j] = w[0];
    }
  };

  template <class Passes, class Visit>
  SAE_INLINE void score(const float* W, int64_t latents, const Passes& passes, const Visit& visit) {
    Pairs<float, kLanes<float>> last;
    const auto decide = [&] {
      last.fill();
      const Vec<float> scores = dot_pairs(last.x, last.w, D);
      for (int j = 0; j < last.n; ++j) {
        if (passes(last.token[j], last.i[j], scores[j])) visit(last.token[j], last.i[j], scores[j]);
      }
      last.n = 0;
    };
    Pairs<int16_t, 4> next;
    const auto narrow_down = [&] {
      next.fill();
      float dots[4];
      dot_quick(next.x, next.w, D, dots);
      for (int j = 0; j < next.n; ++j) {
        const int64_t t = next.token[j], i = next.i[j];
        const Short& own = shorts[t];
        const float slack = length[i] * (own.error + 2 * rounding() * own.length);
        if (!passes(t, i, dots[j] * own.scale + slack)) continue;
        last.add(x + rows[t] * D, next.w[j], t, i);
        if (last.n == kLanes<float>) decide();
      }
      next.n = 0;
    };
    for (int64_t i = 0; i < latents; ++i) {
      for (int32_t j = 0; j < passes_of[i]; ++j) {
        const int64_t t = passed[i * tokens + j];
        next.add(short_rows + t * narrow_stride(D), W + i * D, t, i);
        if (next.n == 4) narrow_down();
      }
    }
    if (next.n) narrow_down();
    if (last.n) decide();
  }
};

}  // namespace sae::SAE_ISA
