// The selecting encoders and the router, against plain loops over integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "buffers.h"
#include "isa.h"
#include "shapes.h"

namespace sae::test {

// Integer operands of an encoder.
struct Operands {
  std::vector<int> x, W, b;
  int64_t score(Shape s, int64_t token, int64_t latent) const {
    int64_t h = b[latent];
    for (int64_t d = 0; d < s.D; ++d) h += x[token * s.D + d] * W[latent * s.D + d];
    return h;
  }
};

// How an encoder rules out scores before it computes them.
struct RuledOut {
  Screening screening;
  bool narrow;
};

// Rows of small integers in 8 bits as few_narrow.h has them: nothing is lost by a scale of 1.
inline int64_t narrow_bytes(Shape s) { return s.F * ((s.D + 31) / 32 * 32 + 16); }
inline void narrow_rows(const std::vector<int>& W, Shape s, Buffer<int8_t>& rows) {
  const int64_t bytes = narrow_bytes(s) / s.F, stride = bytes - 16;
  for (int64_t f = 0; f < s.F; ++f) {
    int8_t* row = &rows[f * bytes];
    std::fill(row, row + bytes, int8_t{0});
    int64_t squares = 0;
    for (int64_t d = 0; d < s.D; ++d) {
      row[d] = static_cast<int8_t>(W[f * s.D + d]);
      squares += row[d] * row[d];
    }
    const float fields[2] = {1,
                             static_cast<float>(std::sqrt(static_cast<double>(squares)) * 1.001)};
    std::memcpy(row + stride, fields, sizeof(fields));
  }
}

template <class E>
void select(const KernelTable& kernels, Shape s, bool scaled, bool by_magnitude, RuledOut how,
            int threads, Random& random) {
  using T = Acc<E>;
  Buffer<E> x(s.B * s.D), W(s.F * s.D);
  Buffer<T> b(s.F), scale(s.F), values(s.B * s.k);
  Buffer<int32_t> indices(s.B * s.k);
  const Operands operands{fill(x, random), fill(W, random), fill(b, random)};
  const auto scales = fill(scale, random);
  Buffer<int8_t> narrow(narrow_bytes(s));
  narrow_rows(operands.W, s, narrow);
  SelectTopkArgs args{kDType<E>,
                      x.data(),
                      W.data(),
                      b.data(),
                      scaled ? scale.data() : nullptr,
                      how.narrow ? narrow.data() : nullptr,
                      nullptr,
                      values.data(),
                      indices.data(),
                      s.B,
                      s.D,
                      s.F,
                      s.k,
                      {},
                      how.screening,
                      by_magnitude,
                      nullptr,
                      threads};
  Buffer<char> workspace(static_cast<int64_t>(kernels.select_topk_workspace(args)), kAlign);
  args.workspace = workspace.data();
  kernels.select_topk(args);
  std::vector<int64_t> h(s.F), key(s.F), order(s.F);
  for (int64_t t = 0; t < s.B; ++t) {
    for (int64_t f = 0; f < s.F; ++f) {
      h[f] = operands.score(s, t, f);
      key[f] = scaled ? h[f] * scales[f] : h[f];
      if (by_magnitude) key[f] = std::abs(key[f]);
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return key[i] > key[j]; });
    for (int64_t j = 0; j < s.k; ++j) {
      check(indices[t * s.k + j] == order[j], "select_topk: index", t * s.k + j);
      check(values[t * s.k + j] == static_cast<T>(h[order[j]]), "select_topk: value", t * s.k + j);
    }
  }
}

// Tokens that go to experts at random, the last of which has none where there are others; inside an
// expert they come in any order. Every expert has the shape's latents.
template <class E>
void select_routed(const KernelTable& kernels, Shape s, int experts, RuledOut how, int threads,
                   Random& random) {
  using T = Acc<E>;
  const int64_t F = experts * s.F;
  Buffer<E> x(s.B * s.D), W(F * s.D);
  Buffer<T> b(F), values(s.B * s.k);
  Buffer<int32_t> indices(s.B * s.k), tokens(s.B), starts(experts + 1);
  const Operands operands{fill(x, random), fill(W, random), fill(b, random)};
  std::vector<std::vector<int32_t>> own(experts);
  for (int64_t t = s.B - 1; t >= 0; --t) {
    own[random.below(std::max(1, experts - 1))].push_back(static_cast<int32_t>(t));
  }
  int32_t place = starts[0] = 0;
  for (int e = 0; e < experts; ++e) {
    for (const int32_t token : own[e]) tokens[place++] = token;
    starts[e + 1] = place;
  }
  SelectTopkArgs args{};
  args.dtype = kDType<E>, args.x = x.data(), args.W = W.data(), args.b = b.data();
  args.values = values.data(), args.indices = indices.data();
  args.B = s.B, args.D = s.D, args.F = F, args.k = s.k, args.threads = threads;
  args.routes = {tokens.data(), starts.data(), experts};
  const Shape whole{s.B, s.D, F, s.k};
  Buffer<int8_t> narrow(narrow_bytes(whole));
  narrow_rows(operands.W, whole, narrow);
  args.narrow = how.narrow ? narrow.data() : nullptr;
  args.screening = how.screening;
  Buffer<char> workspace(static_cast<int64_t>(kernels.select_topk_workspace(args)), kAlign);
  args.workspace = workspace.data();
  check(kernels.select_topk(args), "select_topk, routed: refused", 0);
  std::vector<int64_t> h(s.F), order(s.F);
  for (int e = 0; e < experts; ++e) {
    for (const int64_t t : own[e]) {
      for (int64_t f = 0; f < s.F; ++f) h[f] = operands.score(s, t, e * s.F + f);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return h[i] > h[j]; });
      for (int64_t j = 0; j < s.k; ++j) {
        const int64_t at = t * s.k + j;
        check(indices[at] == e * s.F + order[j], "select_topk, routed: index", at);
        check(values[at] == static_cast<T>(h[order[j]]), "select_topk, routed: value", at);
      }
    }
  }
  for (const int64_t wrong : {int64_t{-1}, s.B}) {
    if (s.B == 0) break;
    tokens[0] = static_cast<int32_t>(wrong);
    check(!kernels.select_topk(args), "select_topk, routed: took a token that is none", wrong);
  }
}

// The shape's latents as experts.
template <class E>
void route(const KernelTable& kernels, Shape s, int threads, Random& random) {
  using T = Acc<E>;
  Buffer<E> x(s.B * s.D), W(s.F * s.D);
  Buffer<T> b(s.F), probabilities(s.B * s.F);
  Buffer<int32_t> experts(s.B);
  const Operands operands{fill(x, random), fill(W, random), fill(b, random)};
  RouteTop1Args args{kDType<E>, x.data(), W.data(), b.data(), experts.data(), probabilities.data(),
                     s.B,       s.D,      s.F,      nullptr,  threads};
  Buffer<char> workspace(static_cast<int64_t>(kernels.route_top1_workspace(args)), kAlign);
  args.workspace = workspace.data();
  kernels.route_top1(args);
  std::vector<int64_t> logits(s.F);
  for (int64_t t = 0; t < s.B; ++t) {
    for (int64_t e = 0; e < s.F; ++e) logits[e] = operands.score(s, t, e);
    const auto best = std::max_element(logits.begin(), logits.end());
    check(experts[t] == best - logits.begin(), "route_top1: expert", t);
    double sum = 0;
    for (const int64_t logit : logits) sum += std::exp(static_cast<double>(logit - *best));
    for (int64_t e = 0; e < s.F; ++e) {
      const double p = std::exp(static_cast<double>(logits[e] - *best)) / sum;
      const double came = static_cast<double>(probabilities[t * s.F + e]);
      check(std::abs(came - p) <= 1e-4 * p + 1e-30, "route_top1: probability", t * s.F + e);
    }
  }
}

// Bounds around `level`: nothing, a few, about half or all scores are above them.
template <class E>
void threshold(const KernelTable& kernels, Shape s, int level, RuledOut how, int threads,
               Random& random) {
  using T = Acc<E>;
  Buffer<E> x(s.B * s.D), W(s.F * s.D);
  Buffer<T> b(s.F), bounds(s.F);
  const Operands operands{fill(x, random), fill(W, random), fill(b, random)};
  auto bound = fill(bounds, random);
  for (int64_t f = 0; f < s.F; ++f) bounds[f] = static_cast<T>(bound[f] += level);
  Buffer<int8_t> narrow(narrow_bytes(s));
  narrow_rows(operands.W, s, narrow);
  SelectThresholdArgs args{kDType<E>,     x.data(),      W.data(),
                           b.data(),      bounds.data(), how.narrow ? narrow.data() : nullptr,
                           s.B,           s.D,           s.F,
                           how.screening, nullptr,       threads};
  Buffer<char> workspace(static_cast<int64_t>(kernels.select_threshold_workspace(args)), kAlign);
  args.workspace = workspace.data();
  const auto found = kernels.select_threshold(args);
  const int64_t n = found->count();
  Buffer<T> values(n);
  Buffer<int32_t> indices(n), offsets(s.B + 1);
  found->write(values.data(), indices.data(), offsets.data());
  int64_t place = 0;
  for (int64_t t = 0; t < s.B; ++t) {
    check(offsets[t] == place, "select_threshold: offset", t);
    for (int64_t f = 0; f < s.F; ++f) {
      const int64_t h = operands.score(s, t, f);
      if (h <= bound[f]) continue;
      check(place < n && indices[place] == f && values[place] == static_cast<T>(h),
            "select_threshold: entry", place);
      ++place;
    }
  }
  check(offsets[s.B] == place && n == place, "select_threshold: number of entries", n);
}

}  // namespace sae::test
