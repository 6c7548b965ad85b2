// route_top1: each token's scores against the experts, their softmax and the largest of them, in
// one pass over the tokens.
#pragma once

#include "sae_kernels/encoder.h"

namespace sae::SAE_ISA {

// Not of namespace std: a function of its own there could be another ISA's copy.
SAE_INLINE float exponential(float x) { return __builtin_expf(x); }
SAE_INLINE double exponential(double x) { return __builtin_exp(x); }

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

    void start_tile(int64_t, int64_t) {}

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
      const T highest = row[best];
      T sum{0};
      for (int64_t e = 0; e < a.E; ++e) sum += row[e] = exponential(row[e] - highest);
      for (int64_t e = 0; e < a.E; ++e) row[e] /= sum;
      return best;
    }
  };
};

}  // namespace sae::SAE_ISA
