// The decoder, the order by latents and what it serves, against plain loops over integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffers.h"
#include "isa.h"
#include "shapes.h"

namespace sae::test {

// Codes in either form, groups, and how they reconstruct, in integers.
struct Codes {
  std::vector<int> values, W, b, target, weights;
  std::vector<int32_t> indices, offsets, ends;

  int64_t group(int32_t latent) const {
    return std::upper_bound(ends.begin(), ends.end() - 1, latent) - ends.begin();
  }
  int64_t reconstructed(Shape s, int64_t g, int64_t token, int64_t d) const {
    int64_t sum = b[d];
    for (int64_t j = offsets[token]; j < offsets[token + 1]; ++j) {
      if (indices[j] < ends[g]) sum += values[j] * W[indices[j] * s.D + d];
    }
    return sum;
  }
  template <class Residual>
  int64_t dot(Shape s, int64_t j, const Residual& residual) const {
    int64_t sum = 0;
    for (int64_t d = 0; d < s.D; ++d) sum += residual(d) * W[indices[j] * s.D + d];
    return sum;
  }
};

struct Form {
  int64_t groups;
  bool ragged, weighted;
};
// Three groups split the latents unevenly, the first of them empty.
inline constexpr Form kForms[] = {
    {1, false, false}, {3, false, false}, {3, false, true}, {1, true, false}, {3, true, true}};

inline std::vector<int32_t> some_offsets(Shape s, bool ragged, Random& random) {
  std::vector<int32_t> offsets{0};
  for (int64_t t = 0; t < s.B; ++t) {
    // Every third token has none; others have up to twice as many as k.
    const int64_t n = !ragged ? s.k : t % 3 == 1 ? 0 : random.below(2 * s.k + 1);
    offsets.push_back(offsets.back() + static_cast<int32_t>(n));
  }
  return offsets;
}

template <class T>
void check_residuals(const Codes& codes, Shape s, Form form, Buffer<T>& out, Buffer<T>& sse,
                     Buffer<T>& grad) {
  for (int64_t t = 0; t < s.B; ++t) {
    std::vector<int64_t> e(static_cast<size_t>(form.groups * s.D));
    for (int64_t g = form.groups - 1; g >= 0; --g) {
      int64_t squares = 0;
      for (int64_t d = 0; d < s.D; ++d) {
        const int64_t difference = codes.reconstructed(s, g, t, d) - codes.target[t * s.D + d];
        squares += difference * difference;
        e[g * s.D + d] = codes.weights[g] * difference;
        if (g + 1 < form.groups) e[g * s.D + d] += e[(g + 1) * s.D + d];
        const int64_t at = (g * s.B + t) * s.D + d;
        check(out[at] == static_cast<T>(e[g * s.D + d]), "decode: residual", at);
      }
      const T exact = static_cast<T>(squares);
      check(std::abs(sse[g * s.B + t] - exact) <= T(1e-4) * exact, "decode: squared error", t);
    }
    for (int64_t j = codes.offsets[t]; j < codes.offsets[t + 1]; ++j) {
      const int64_t* row = e.data() + codes.group(codes.indices[j]) * s.D;
      const int64_t dot = codes.dot(s, j, [&](int64_t d) { return row[d]; });
      check(grad[j] == static_cast<T>(codes.values[j] ? dot : 0), "decode: code gradient", j);
    }
  }
}

// decode in its plain and its fused form, and code_grad.
template <class E>
void decode(const KernelTable& kernels, Shape s, Form form, int threads, Random& random) {
  using T = Acc<E>;
  Codes codes;
  codes.offsets = some_offsets(s, form.ragged, random);
  const int64_t N = codes.offsets.back(), G = form.groups;
  Buffer<T> values(N), b(s.D), target(s.B * s.D), weights(G), out(G * s.B * s.D), sse(G * s.B),
      grad(N), group_grad(G * s.B * s.D);
  Buffer<E> W(s.F * s.D);
  Buffer<int32_t> indices(N), offsets(s.B + 1), ends(G);
  codes.values = fill(values, random), codes.W = fill(W, random), codes.b = fill(b, random);
  codes.target = fill(target, random), codes.weights = fill(weights, random);
  if (!form.weighted) codes.weights.assign(static_cast<size_t>(G), 1);
  const auto gs = fill(group_grad, random);
  for (int64_t g = 0; g < G; ++g) codes.ends.push_back(static_cast<int32_t>(s.F * g / 2));
  codes.ends.back() = static_cast<int32_t>(s.F);
  for (int64_t j = 0; j < N; ++j) codes.indices.push_back(random.below(s.F));
  std::copy(codes.ends.begin(), codes.ends.end(), ends.data());
  std::copy(codes.offsets.begin(), codes.offsets.end(), offsets.data());
  std::copy(codes.indices.begin(), codes.indices.end(), indices.data());

  const int32_t* starts = form.ragged ? offsets.data() : nullptr;
  const int32_t* group_ends = G > 1 ? ends.data() : nullptr;
  DecodeArgs args{kDType<E>,
                  values.data(),
                  indices.data(),
                  starts,
                  W.data(),
                  b.data(),
                  group_ends,
                  nullptr,
                  nullptr,
                  out.data(),
                  nullptr,
                  nullptr,
                  s.B,
                  form.ragged ? 1 : s.k,
                  s.D,
                  s.F,
                  G,
                  s.F % 2 ? 1 : 2,
                  true,
                  threads};
  check(kernels.decode(args), "decode: in range");
  for (int64_t i = 0; i < G * s.B * s.D; ++i) {
    const int64_t g = i / s.D / s.B, t = i / s.D % s.B;
    check(out[i] == static_cast<T>(codes.reconstructed(s, g, t, i % s.D)), "decode: output", i);
  }
  args.target = target.data();
  args.group_weights = form.weighted ? weights.data() : nullptr;
  args.sse = sse.data();
  args.code_grad = grad.data();
  check(kernels.decode(args), "decode with a target: in range");
  check_residuals(codes, s, form, out, sse, grad);

  Buffer<T> dots(N);
  check(kernels.code_grad({kDType<E>, group_grad.data(), indices.data(), starts, W.data(),
                           group_ends, dots.data(), s.B, args.K, s.D, s.F, G, threads}),
        "code_grad: in range");
  for (int64_t t = 0; t < s.B; ++t) {
    for (int64_t j = codes.offsets[t]; j < codes.offsets[t + 1]; ++j) {
      const int* row = gs.data() + (codes.group(codes.indices[j]) * s.B + t) * s.D;
      const int64_t dot = codes.dot(s, j, [&](int64_t d) { return row[d]; });
      check(dots[j] == static_cast<T>(dot), "code_grad", j);
    }
  }
}

// Updates an fp32 matrix and the same one in halves with rounded moments, which betas of 0 leave
// without a say: squared norms and weights are equal bit for bit.
inline void update_both_layouts(const KernelTable& kernels, const RowUpdateArgs& whole) {
  const int64_t n = whole.F * whole.width;
  float* const param = static_cast<float*>(whole.param);
  Buffer<uint16_t> low(n), high(n), m(n), v(n);
  Buffer<float> sqnorm(whole.F), split_sqnorm(whole.F);
  const auto bits_of = [](float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    return bits;
  };
  for (int64_t i = 0; i < n; ++i) {
    low[i] = static_cast<uint16_t>(bits_of(param[i]));
    high[i] = static_cast<uint16_t>((bits_of(param[i]) + 0x8000) >> 16);
    m[i] = v[i] = 0;
  }
  RowUpdateArgs split = whole, norms = whole, split_norms;
  split.param_dtype = DType::i16, split.moment_dtype = DType::bf16;
  split.param = low.data(), split.copy = high.data(), split.m = m.data(), split.v = v.data();
  split_norms = split;
  norms.sqnorm = sqnorm.data(), split_norms.sqnorm = split_sqnorm.data();
  const RowUpdateArgs* const calls[] = {&norms, &split_norms, &whole, &split};
  for (const RowUpdateArgs* args : calls) {
    kernels.row_update(*args);
  }
  for (int64_t f = 0; f < whole.F; ++f) {
    check(bits_of(sqnorm[f]) == bits_of(split_sqnorm[f]), "row_sqnorm of halves", f);
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t joined = (static_cast<uint32_t>(high[i]) << 16) +
                            static_cast<uint32_t>(static_cast<int16_t>(low[i]));
    check(joined == bits_of(param[i]), "row_update of halves", i);
  }
}

// transpose_codes, then row_grad and row_update over the order it gives.
template <class T, class E>
void rows(const KernelTable& kernels, Shape s, int threads, Random& random) {
  const int64_t N = s.B * s.k;
  Buffer<T> values(N), grad(s.F * s.D);
  Buffer<E> source(s.B * s.D);
  Buffer<int32_t> indices(N), offsets(s.F + 1), entries(N), order_rows(N), counts(threads * s.F);
  const auto vs = fill(values, random), xs = fill(source, random);
  for (int64_t i = 0; i < N; ++i) indices[i] = random.below(s.F);
  const bool in_range = kernels.transpose_codes({kDType<T>, indices.data(), values.data(), nullptr,
                                                 offsets.data(), entries.data(), order_rows.data(),
                                                 counts.data(), N, s.F, s.k, true, threads});
  check(in_range, "transpose_codes: in range");
  const Term terms[] = {
      {offsets.data(), entries.data(), order_rows.data(), values.data(), source.data(), kDType<E>},
      {offsets.data(), entries.data(), order_rows.data(), values.data(), nullptr, kDType<E>}};
  kernels.row_grad({kDType<T>, terms, 2, s.F, s.D, grad.data(), threads});
  std::vector<int64_t> exact(s.F * s.D);
  int64_t place = 0;
  for (int64_t f = 0; f < s.F; ++f) {
    check(offsets[f] == place, "transpose_codes: offset", f);
    for (int64_t e = 0; e < N; ++e) {
      if (indices[e] != f || vs[e] == 0) continue;
      check(entries[place] == e && order_rows[place] == e / s.k, "transpose_codes: entry", e);
      ++place;
      for (int64_t d = 0; d < s.D; ++d) exact[f * s.D + d] += vs[e] * (xs[e / s.k * s.D + d] + 1);
    }
  }
  check(offsets[s.F] == place, "transpose_codes: last offset");
  for (int64_t i = 0; i < s.F * s.D; ++i) {
    check(grad[i] == static_cast<T>(exact[i]), "row_grad", i);
  }

  // Adam with beta1 = beta2 = 0 and eps = 0 moves by lr times the sign of the gradient; 3 * sign
  // with integers stays exact. A latent of the dense block and the skipped rest of it come along.
  Buffer<T> param(s.F * s.D), m(s.F * s.D), v(s.F * s.D), dense(2 * s.D),
      work(threads * 2 * s.D, kAlign), sqnorm(s.F);
  Buffer<uint16_t> copy(s.F * s.D);
  Buffer<int32_t> slot(s.F);
  Buffer<double> hyper(6);
  const auto ps = fill(param, random), ds = fill(dense, random);
  for (int64_t i = 0; i < s.F * s.D; ++i) m[i] = v[i] = T{0};
  for (int64_t f = 0; f < s.F; ++f) slot[f] = -1;
  slot[s.F - 1] = 1;
  for (int64_t d = 0; d < s.D; ++d) exact[(s.F - 1) * s.D + d] += ds[s.D + d];
  const double settings[] = {3, 1, 1, 1, 0, 1};
  std::copy(settings, settings + 6, hyper.data());
  RowUpdateArgs args{kDType<T>,    kDType<T>,   DType::bf16, param.data(), m.data(), v.data(),
                     copy.data(),  terms,       2,           s.F,          s.D,      nullptr,
                     dense.data(), slot.data(), 1,           hyper.data(), 0,        0,
                     1e-30,        Norm::none,  1,           true,         nullptr,  work.data(),
                     threads};
  args.sqnorm = sqnorm.data();
  kernels.row_update(args);
  args.sqnorm = nullptr;
  kernels.row_update(args);
  for (int64_t i = 0; i < s.F * s.D; ++i) {
    const int64_t sign = (exact[i] > 0) - (exact[i] < 0);
    check(std::abs(param[i] - static_cast<T>(ps[i] - 3 * sign)) <= T(1e-5), "row_update", i);
  }
  for (int64_t f = 0; f < s.F; ++f) {
    int64_t squares = 0;
    for (int64_t d = 0; d < s.D; ++d) squares += exact[f * s.D + d] * exact[f * s.D + d];
    check(std::abs(sqnorm[f] - static_cast<T>(squares)) <= T(1e-4) * static_cast<T>(squares),
          "row_sqnorm", f);
  }
  // A penalty on norms alone has a gradient as long as its coefficient, whatever is not zero.
  const int64_t parts = s.D % 3 == 0 ? 3 : 1, width = s.D / parts;
  Buffer<T> row_coef(s.F * parts);
  const auto coef = fill(row_coef, random);
  args.row_coef = row_coef.data();
  args.row_parts = parts;
  args.n_terms = 0;
  args.dense_grad = args.dense_slot = nullptr;
  args.sqnorm = sqnorm.data();
  kernels.row_update(args);
  for (int64_t f = 0; f < s.F; ++f) {
    T squares{0};
    for (int64_t i = 0; i < parts; ++i) {
      const T* part = param.data() + f * s.D + i * width;
      const bool zero = std::all_of(part, part + width, [](T w) { return w == T{0}; });
      if (!zero) squares += static_cast<T>(coef[f * parts + i] * coef[f * parts + i]);
    }
    check(std::abs(sqnorm[f] - squares) <= T(1e-4) * squares, "row_sqnorm of a penalty", f);
  }
  // The other policies, for their memory accesses; their values are the Python tests' business.
  args.sqnorm = nullptr;
  args.n_terms = 2;
  args.dense_grad = dense.data();
  args.dense_slot = slot.data();
  for (const Norm norm : {Norm::unit, Norm::at_most_one, Norm::none}) {
    args.norm = norm;
    args.slices = parts;
    args.lazy = norm == Norm::none;
    args.copy_dtype = DType::f16;
    if constexpr (sizeof(T) == 4) {
      update_both_layouts(kernels, args);
    } else {
      kernels.row_update(args);
    }
  }
}

inline void refuse_bad_indices(const KernelTable& kernels) {
  for (const int32_t wrong : {-1, 5, 2147483647, -2147483647 - 1}) {
    Buffer<float> values(6), W(5 * 3), out(2 * 3);
    Buffer<int32_t> indices(6), offsets(6), entries(6), order_rows(6), counts(2 * 5);
    for (int i = 0; i < 6; ++i) values[i] = 1, indices[i] = 0;
    for (int i = 0; i < 15; ++i) W[i] = 1;
    indices[4] = wrong;
    Buffer<int32_t> starts(3);
    for (int t = 0; t < 3; ++t) starts[t] = 3 * t;
    for (const int32_t* ragged : {static_cast<int32_t*>(nullptr), starts.data()}) {
      DecodeArgs args{};
      args.values = values.data(), args.indices = indices.data(), args.offsets = ragged;
      args.W = W.data(), args.out = out.data();
      args.B = 2, args.K = 3, args.D = 3, args.F = 5, args.G = 1, args.threads = 1;
      check(!kernels.decode(args), "decode refuses", wrong);
      check(!kernels.code_grad({DType::f32, W.data(), indices.data(), ragged, W.data(), nullptr,
                                values.data(), 2, 3, 3, 5, 1, 1}),
            "code_grad refuses", wrong);
    }
    check(!kernels.transpose_codes({DType::f32, indices.data(), values.data(), nullptr,
                                    offsets.data(), entries.data(), order_rows.data(),
                                    counts.data(), 6, 5, 3, false, 2}),
          "transpose_codes refuses", wrong);
  }
}

}  // namespace sae::test
