// route_top1: each token's scores against the experts, their softmax and the largest of them, in
// one pass over the tokens.
#pragma once

#include <limits>

#include "sae_kernels/encoder.h"

namespace sae::SAE_ISA {

SAE_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// e^x for x <= 0 (NaN stays), within 2 ulp: x = n ln 2 + r, a polynomial for e^r on |r| <= ln 2 / 2
// whose first neglected term is below 2^-26, and n added to the exponent. In fp32 libm's function
// would take longer than the product with as many experts.
SAE_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> least = splat(-87.3365f);  // below it no result is a normal number
  const auto tiny = x < least;
  x = tiny ? least : x;
  const Vec<float> shifted = x * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23 rounds
  const Vec<float> n = shifted - splat(12582912.0f);
  const Vec<float> r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Vec<float> p = splat(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = p * r + splat(c);
  }
  const Vec<int32_t> exponent = reinterpret_cast<Vec<int32_t>>(shifted) << 23;
  const Vec<float> result =
      reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<int32_t>>(p) + exponent);
  return x != x ? x : tiny ? Vec<float>{} : result;
}

template <class Product>
class RouteTop1 {
  using T = typename Product::T;

 public:
  explicit RouteTop1(const RouteTop1Args& args)
      : a(args), encoder{args.x, args.W, args.b, args.B, args.D, args.E, args.threads} {}

  size_t workspace() const { return encoder.thread_bytes() * static_cast<size_t>(a.threads); }

  void run() const {
    encoder.run(a.workspace, 0, [&](Carver&) { return Sink{a, nullptr}; });
  }

 private:
  const RouteTop1Args& a;
  Encoder<Product> encoder;

  struct Sink {
    const RouteTop1Args& a;
    T* logits;  // of the block's tokens, where their probabilities will be

    void start_block(int64_t, const Rows& rows, int64_t) {
      logits = static_cast<T*>(a.probabilities) + rows.first * a.E;
    }

    bool start_tile(int64_t, int64_t, const T*) { return true; }

    void scan(const T* scores, const T* bias, int64_t e, int64_t experts, int64_t token,
              int64_t count) {
      constexpr int kGroup = Product::kGroup;
      const int64_t end = std::min<int64_t>(count, token + Product::kTokenStep);
      for (; token < end; token += kGroup, scores += Product::kLatents * kGroup) {
        const int64_t lanes = std::min<int64_t>(kGroup, end - token);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          T* row = logits + (token + lane) * a.E + e;
          for (int64_t i = 0; i < experts; ++i) row[i] = scores[i * kGroup + lane] + bias[i];
        }
      }
    }

    void finish_block(const Rows& rows, int64_t count) {
      for (int64_t t = 0; t < count; ++t) a.experts[rows[t]] = route(logits + t * a.E);
    }

    // Turns a token's logits into probabilities. The first NaN wins, else the first maximum.
    int32_t route(T* row) const {
      int32_t best = 0;
      for (int64_t e = 1; e < a.E && row[best] == row[best]; ++e) {
        if (!(row[e] <= row[best])) best = static_cast<int32_t>(e);
      }
      const T sum = exponentials(row, row[best]);
      for (int64_t e = 0; e < a.E; ++e) row[e] /= sum;
      return best;
    }

    // Replaces logits by their exponentials, the highest's being 1, and returns the sum.
    T exponentials(T* row, T highest) const {
      Vec<T> sum{};
      for (int64_t e = 0; e < a.E; e += kLanes<T>) {
        const size_t bytes = static_cast<size_t>(std::min<int64_t>(kLanes<T>, a.E - e)) * sizeof(T);
        Vec<T> x = splat(-std::numeric_limits<T>::infinity());
        std::memcpy(&x, row + e, bytes);
        x = exponential(x - splat(highest));
        sum += x;
        std::memcpy(row + e, &x, bytes);
      }
      return horizontal_sum<T>(sum);
    }
  };
};

}  // namespace sae::SAE_ISA
