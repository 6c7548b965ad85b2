// Every kernel of one ISA variant over odd shapes, against plain loops over integers.
//
// Usage: kernels_test <isa>; exit code 77 where this machine cannot run the variant.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "buffers.h"
#include "isa.h"

namespace sae::test {
namespace {

struct Shape {
  int64_t B, D, F, k;
};
// Around the widths of vectors, tiles and batches of rows; k = 1, k = F, no token at all.
constexpr Shape kShapes[] = {{0, 3, 5, 2},      {1, 1, 1, 1},     {3, 7, 2, 2},
                             {5, 16, 33, 33},   {16, 31, 48, 7},  {17, 33, 49, 48},
                             {33, 32, 97, 5},   {2, 65, 700, 40}, {64, 64, 128, 1},
                             {7, 129, 211, 13}, {9, 5, 1100, 600}};

template <class E>
void select(const KernelTable& kernels, Shape s, bool scaled, int threads, Random& random) {
  using T = Acc<E>;
  Buffer<E> x(s.B * s.D), W(s.F * s.D);
  Buffer<T> b(s.F), scale(s.F), values(s.B * s.k);
  Buffer<int32_t> indices(s.B * s.k);
  const auto xs = fill(x, random), ws = fill(W, random), bs = fill(b, random);
  const auto scales = fill(scale, random);
  SelectTopkArgs args{
      kDType<E>,     x.data(),       W.data(), b.data(), scaled ? scale.data() : nullptr,
      values.data(), indices.data(), s.B,      s.D,      s.F,
      s.k,           nullptr,        threads};
  Buffer<char> workspace(static_cast<int64_t>(kernels.select_topk_workspace(args)), kAlign);
  args.workspace = workspace.data();
  kernels.select_topk(args);
  std::vector<int64_t> h(s.F), key(s.F), order(s.F);
  for (int64_t t = 0; t < s.B; ++t) {
    for (int64_t f = 0; f < s.F; ++f) {
      h[f] = bs[f];
      for (int64_t d = 0; d < s.D; ++d) h[f] += xs[t * s.D + d] * ws[f * s.D + d];
      key[f] = scaled ? h[f] * scales[f] : h[f];
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return key[i] > key[j]; });
    for (int64_t j = 0; j < s.k; ++j) {
      check(indices[t * s.k + j] == order[j], "select_topk: index", t * s.k + j);
      check(values[t * s.k + j] == static_cast<T>(h[order[j]]), "select_topk: value", t * s.k + j);
    }
  }
}

template <class E>
void decode(const KernelTable& kernels, Shape s, bool fused, int threads, Random& random) {
  using T = Acc<E>;
  const int64_t groups = fused ? 1 : 3;
  Buffer<T> values(s.B * s.k), b(s.D), target(s.B * s.D), out(groups * s.B * s.D), sse(s.B),
      grad(s.B * s.k), group_grad(groups * s.B * s.D);
  Buffer<E> W(s.F * s.D);
  Buffer<int32_t> indices(s.B * s.k), ends(groups);
  const auto vs = fill(values, random), bs = fill(b, random), ts = fill(target, random);
  const auto ws = fill(W, random), gs = fill(group_grad, random);
  for (int64_t i = 0; i < s.B * s.k; ++i) indices[i] = random.below(s.F);
  for (int64_t g = 0; g < groups; ++g) ends[g] = static_cast<int32_t>(s.F * (g + 1) / groups);
  const int32_t* group_ends = fused ? nullptr : ends.data();
  const bool in_range =
      kernels.decode({kDType<E>, values.data(), indices.data(), W.data(), b.data(), group_ends,
                      fused ? target.data() : nullptr, out.data(), fused ? sse.data() : nullptr,
                      fused ? grad.data() : nullptr, s.B, s.k, s.D, s.F, groups, true, threads});
  check(in_range, "decode: in range");
  for (int64_t t = 0; t < s.B; ++t) {
    int64_t squares = 0;
    std::vector<int64_t> e(s.D);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t d = 0; d < s.D; ++d) {
        int64_t sum = bs[d];
        for (int64_t j = t * s.k; j < (t + 1) * s.k; ++j) {
          if (indices[j] < ends[g]) sum += vs[j] * ws[indices[j] * s.D + d];
        }
        e[d] = fused ? sum - ts[t * s.D + d] : sum;
        squares += e[d] * e[d];
        const int64_t at = (g * s.B + t) * s.D + d;
        check(out[at] == static_cast<T>(e[d]), "decode: output", at);
      }
    }
    if (!fused) continue;
    check(std::abs(sse[t] - static_cast<T>(squares)) <= T(1e-4) * static_cast<T>(squares),
          "decode: squared error", t);
    for (int64_t j = t * s.k; j < (t + 1) * s.k; ++j) {
      int64_t dot = 0;
      for (int64_t d = 0; d < s.D; ++d) dot += e[d] * ws[indices[j] * s.D + d];
      check(grad[j] == static_cast<T>(vs[j] ? dot : 0), "decode: code gradient", j);
    }
  }
  if (fused) return;
  Buffer<T> dots(s.B * s.k);
  kernels.code_grad({kDType<E>, group_grad.data(), indices.data(), W.data(), group_ends,
                     dots.data(), s.B, s.k, s.D, s.F, groups, threads});
  for (int64_t j = 0; j < s.B * s.k; ++j) {
    const int64_t g = std::upper_bound(ends.data(), ends.data() + groups, indices[j]) - ends.data();
    int64_t dot = 0;
    for (int64_t d = 0; d < s.D; ++d) {
      dot += gs[(g * s.B + j / s.k) * s.D + d] * ws[indices[j] * s.D + d];
    }
    check(dots[j] == static_cast<T>(dot), "code_grad", j);
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
      work(threads * s.D, kAlign), sqnorm(s.F);
  Buffer<uint16_t> copy(s.F * s.D);
  Buffer<int32_t> slot(s.F);
  Buffer<double> hyper(5);
  const auto ps = fill(param, random), ds = fill(dense, random);
  for (int64_t i = 0; i < s.F * s.D; ++i) m[i] = v[i] = T{0};
  for (int64_t f = 0; f < s.F; ++f) slot[f] = -1;
  slot[s.F - 1] = 1;
  for (int64_t d = 0; d < s.D; ++d) exact[(s.F - 1) * s.D + d] += ds[s.D + d];
  const double settings[] = {3, 1, 1, 1, 0};
  std::copy(settings, settings + 5, hyper.data());
  RowUpdateArgs args{kDType<T>,
                     DType::bf16,
                     param.data(),
                     m.data(),
                     v.data(),
                     copy.data(),
                     terms,
                     2,
                     s.F,
                     s.D,
                     nullptr,
                     dense.data(),
                     slot.data(),
                     hyper.data(),
                     0,
                     0,
                     1e-30,
                     Norm::none,
                     1,
                     true,
                     nullptr,
                     work.data(),
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
  // The other policies, for their memory accesses; their values are the Python tests' business.
  for (const Norm norm : {Norm::unit, Norm::at_most_one}) {
    args.norm = norm;
    args.slices = s.D % 3 == 0 ? 3 : 1;
    args.row_coef = sqnorm.data();
    args.lazy = false;
    args.copy_dtype = DType::f16;
    kernels.row_update(args);
  }
}

void refuse_bad_indices(const KernelTable& kernels) {
  for (const int32_t wrong : {-1, 5, 2147483647, -2147483647 - 1}) {
    Buffer<float> values(6), W(5 * 3), out(2 * 3);
    Buffer<int32_t> indices(6), offsets(6), entries(6), order_rows(6), counts(2 * 5);
    for (int i = 0; i < 6; ++i) values[i] = 1, indices[i] = 0;
    for (int i = 0; i < 15; ++i) W[i] = 1;
    indices[4] = wrong;
    check(!kernels.decode({DType::f32, values.data(), indices.data(), W.data(), nullptr, nullptr,
                           nullptr, out.data(), nullptr, nullptr, 2, 3, 3, 5, 1, false, 1}),
          "decode refuses", wrong);
    check(!kernels.code_grad({DType::f32, W.data(), indices.data(), W.data(), nullptr,
                              values.data(), 2, 3, 3, 5, 1, 1}),
          "code_grad refuses", wrong);
    check(!kernels.transpose_codes({DType::f32, indices.data(), values.data(), nullptr,
                                    offsets.data(), entries.data(), order_rows.data(),
                                    counts.data(), 6, 5, 3, false, 2}),
          "transpose_codes refuses", wrong);
  }
}

template <class E>
void all(const KernelTable& kernels, const char* name) {
  uint64_t seed = 0;
  for (const Shape& shape : kShapes) {
    for (const int threads : {1, 3}) {
      char text[96];
      std::snprintf(text, sizeof(text), "%s B=%d D=%d F=%d k=%d threads=%d", name,
                    static_cast<int>(shape.B), static_cast<int>(shape.D), static_cast<int>(shape.F),
                    static_cast<int>(shape.k), threads);
      where = text;
      Random random(++seed);
      for (const bool flag : {false, true}) {
        select<E>(kernels, shape, flag, threads, random);
        decode<E>(kernels, shape, flag, threads, random);
      }
      rows<Acc<E>, E>(kernels, shape, threads, random);
    }
  }
  where = "";
}

}  // namespace
}  // namespace sae::test

int main(int argc, char** argv) {
  using namespace sae;
  if (argc != 2) {
    std::fprintf(stderr, "usage: kernels_test <isa>\n");
    return 2;
  }
  for (const Isa& isa : isas()) {
    if (std::strcmp(isa.name, argv[1]) != 0) continue;
    if (!isa.supported) {
      std::printf("%s: not on this machine\n", isa.name);
      return 77;
    }
    test::all<float>(*isa.kernels, "f32");
    test::all<double>(*isa.kernels, "f64");
    test::all<bf16>(*isa.kernels, "bf16");
    test::all<f16>(*isa.kernels, "f16");
    test::refuse_bad_indices(*isa.kernels);
    std::printf("%s: %d failures\n", isa.name, test::failures);
    return test::failures ? 1 : 0;
  }
  std::fprintf(stderr, "no variant %s in this build\n", argv[1]);
  return 2;
}
