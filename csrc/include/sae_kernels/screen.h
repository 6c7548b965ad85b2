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
  // Whether rows of D can be screened in this way here at all.
  template <class Product>
  static bool serves(Screening how, int64_t D) {
    return kServes<Product> && D <= kNarrowWidth && Int8Product::runs(how);
  }

  static int64_t max_tokens(int64_t D) {
    const int64_t fit = kPackedBytes / D / kTokenStep;
    return kTokenStep * std::min<int64_t>(std::max<int64_t>(fit, 1), 512 / kTokenStep);
  }

  static size_t bytes(int64_t tokens, int64_t D) {
    return packed_bytes(tokens, D) + narrow_bytes(D) + aligned(kBoundsBytes) +
           aligned(passed_bytes(tokens)) + aligned(short_bytes(tokens, D)) +
           aligned(static_cast<size_t>(tokens) * sizeof(Short)) +
           aligned(static_cast<size_t>(D) * sizeof(float));
  }

  Screen(Screening how_, Carver& carver, int64_t tokens_, int64_t D_)
      : how(how_),
        tokens(tokens_),
        D(D_),
        packed(carver.take(packed_bytes(tokens, D))),
        narrow(carver.take<uint8_t>(narrow_bytes(D))),
        bounds(carver.take<float>(kBoundsBytes)),
        passed(carver.take<uint16_t>(passed_bytes(tokens))),
        short_rows(carver.take<int16_t>(short_bytes(tokens, D))),
        shorts(carver.take<Short>(static_cast<size_t>(tokens) * sizeof(Short))),
        scratch(carver.take<float>(static_cast<size_t>(D) * sizeof(float))) {}

  void start_block(const float* x_, const Rows& rows_, int64_t count_) {
    x = x_, rows = rows_, count = count_;
    set_apart();
    resume = pack() ? 0 : kNever;
    patience = kShort;
  }

  // Calls visit(token, i, score) for every score of the tile that may pass, those of a token by
  // ascending latent; or for none and returns false: then the tile has to be multiplied in fp32.
  // renew and test are those of scan_step; passes(token, i, score) tests one.
  template <class Renew, class Test, class Passes, class Visit>
  bool tile(const float* W, int64_t latents, int64_t seen, const Renew& renew, const Test& test,
            const Passes& passes, const Visit& visit) {
    if (seen < resume || !narrow_tile(W, latents)) return false;
    const Int8Product::Tiles tiles(how);
    std::fill(passes_of, passes_of + latents, 0);
    const char* panel = packed;
    int64_t found = 0;
    // The next tile is fetched in equal shares while this one is multiplied.
    const char* ahead = reinterpret_cast<const char*>(W + latents * D);
    const int64_t share = latents * D * static_cast<int64_t>(sizeof(float)) * kTokenStep / count;
    for (int64_t token = 0; token < count; token += kTokenStep) {
      Int8Product::tile(how, panel, narrow, latent, latents, D, apart, bounds, ahead, share);
      ahead += share;
      panel += Int8Product::panel_bytes(D);
      scan_step<Wide>(bounds, latents, token, count, renew, test,
                      [&](int64_t t, int64_t i, float) SAE_INLINE_LAMBDA {
                        passed[i * tokens + passes_of[i]++] = static_cast<uint16_t>(t);
                        ++found;
                      });
      const int64_t pairs = latents * std::min(count, token + kTokenStep);
      if (found * kOneOf > pairs) {
        wait(found * kOneOf, pairs, seen);
        return false;
      }
    }
    const int64_t cost = kBound * found + kScore * score(W, latents, passes, visit);
    if (cost > latents * count) {
      wait(cost, latents * count, seen);
    } else {
      patience = kShort;
    }
    return true;
  }

 private:
  static constexpr size_t kBoundsBytes = sizeof(float) * kTokenStep * kLatents;
  static constexpr int64_t kPackedBytes = 1 << 19;  // of L2, for the narrow tokens of a block
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  static constexpr int64_t kOneOf = 12;  // of so many pairs one may pass
  // What bounding a pair once more and scoring it take, in what the screen saves of an fp32 pair.
  static constexpr int64_t kBound = 8, kScore = 20;
  static constexpr int64_t kShort = 9, kLong = 32;  // waits in eighths of the latents seen

  static constexpr int kApart = Int8Product::kApart;
  static constexpr float kLarge = 8;  // times the average energy: a column that is set apart

  // A token in 16 bits.
  struct Short {
    float scale, whole, error;
  };

  Screening how;
  int64_t tokens, D;
  char* packed;
  uint8_t* narrow;  // [kLatents, narrow_stride(D)]
  float* bounds;
  uint16_t* passed;     // [kLatents, tokens]
  int16_t* short_rows;  // [tokens, narrow_stride(D)]
  Short* shorts;        // [tokens]
  float* scratch;       // [D]
  int64_t columns[kApart];
  int apart = 0;  // of these columns
  int32_t passes_of[kLatents];
  Int8Product::Latent latent[kLatents];
  float whole[kLatents];  // lengths
  const float* x = nullptr;
  Rows rows{};
  int64_t count = 0, resume = 0, patience = kShort;

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

  // A few columns may hold most of the tokens (massive activations): they would take all the steps
  // of a scale for themselves.
  void set_apart() {
    std::fill(scratch, scratch + D, 0.0f);
    for (int64_t t = 0; t < count; ++t) {
      const float* row = x + rows[t] * D;
      for (int64_t d = 0; d < D; ++d) scratch[d] += row[d] * row[d];
    }
    float sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += scratch[d];
    for (apart = 0; apart < kApart; ++apart) {
      float* const most = std::max_element(scratch, scratch + D);
      if (!(*most * static_cast<float>(D) > kLarge * sum)) break;
      columns[apart] = most - scratch;
      *most = 0;
    }
  }

  // narrow_row without the columns apart; `length` is at least the whole row's.
  template <class Q>
  bool narrow_rest(const float* row, Q* q, NarrowRow& out, float& length) {
    if (apart) std::copy(row, row + D, scratch);
    float others = 0;
    for (int j = 0; j < apart; ++j) {
      const float magnitude = std::fabs(row[columns[j]]);
      if (!(magnitude <= kNarrowMost)) return false;
      others += magnitude;
      scratch[columns[j]] = 0;
    }
    if (apart) row = scratch;
    float steps = std::is_same<Q, int16_t>::value ? 32767 : 127;
    if (std::is_same<Q, int8_t>::value) steps = Int8Product::steps(how, row, D);
    const int64_t whole = D / 16 * 16;
    std::memset(q + whole, 0, static_cast<size_t>(narrow_stride(D) - whole) * sizeof(Q));
    if (!narrow_row(row, D, q, out, steps)) return false;
    length = (out.length() + others) * kNarrowUp;
    return length == 0 || length >= kNarrowLeast;
  }

  // Whether all tokens of the block can be screened.
  bool pack() {
    for (int64_t t = 0; t < count; ++t) {
      const float* row = x + rows[t] * D;
      NarrowRow eight, sixteen;
      float length;
      int8_t* q = reinterpret_cast<int8_t*>(narrow);
      if (!narrow_rest(row, q, eight, length)) return false;
      float* own = Int8Product::pack(how, q, eight, length, t, D, packed);
      for (int j = 0; j < apart; ++j) own[j * kTokenStep] = row[columns[j]];
      if (!narrow_rest(row, short_rows + t * narrow_stride(D), sixteen, length)) return false;
      shorts[t] = {sixteen.scale, length, sixteen.error};
    }
    return true;
  }

  // Of a sum of D products and a hundred operations more, as a share of the sum of its terms'
  // magnitudes.
  float rounding() const { return static_cast<float>(D + 128) * 1.01f * 0x1p-24f; }

  __attribute__((noinline)) bool narrow_tile(const float* W, int64_t latents) {
    for (int64_t i = 0; i < latents; ++i) {
      const float* w = W + i * D;
      NarrowRow row;
      if (!narrow_rest(w, narrow + i * narrow_stride(D), row, whole[i])) return false;
      latent[i] = {row.scale, row.narrow, row.error, rounding() * whole[i], {}};
      for (int j = 0; j < apart; ++j) latent[i].apart[j] = w[columns[j]];
    }
    return true;
  }

  // The screen costs more than it is worth, most often because thresholds are low at first. The
  // share that passes falls as one over the latents seen, so it says when to try again. Where it
  // does not fall, waits get longer.
  void wait(int64_t cost, int64_t worth, int64_t seen) {
    resume = seen * std::max(std::min(8 * cost / worth, kLong), patience) / 8;
    patience = std::min(2 * patience - 8, kLong);
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

  // Returns how many pairs were scored.
  template <class Passes, class Visit>
  __attribute__((noinline)) int64_t score(const float* W, int64_t latents, const Passes& passes,
                                          const Visit& visit) {
    int64_t scored = 0;
    Pairs<float, kLanes<float>> last;
    const auto decide = [&] {
      last.fill();
      const Vec<float> scores = dot_pairs(last.x, last.w, D);
      for (int j = 0; j < last.n; ++j) {
        if (passes(last.token[j], last.i[j], scores[j])) visit(last.token[j], last.i[j], scores[j]);
      }
      scored += last.n;
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
        const float* row = x + rows[t] * D;
        float most = dots[j] * own.scale + whole[i] * (own.error + 2 * rounding() * own.whole);
        for (int c = 0; c < apart; ++c) most += row[columns[c]] * latent[i].apart[c];
        if (!passes(t, i, most)) continue;
        last.add(row, next.w[j], t, i);
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
    return scored;
  }
};

}  // namespace sae::SAE_ISA
