// row_grad and row_update: everything that happens to a latent's row of a weight matrix.
//
// The gradient of a row is a short weighted sum of rows of x or of the residual. It is gathered
// into one cache-resident buffer and used up at once: projection, Adam, renormalisation and the
// compute copy happen before the next row is touched, so gradients never reach memory.
#pragma once

#include <type_traits>

#include "sae_kernels/gather.h"
#include "sae_kernels/halves.h"
#include "sae_kernels/parallel.h"

namespace sae::SAE_ISA {

template <class T, class E>
void add_term(const Term& term, int64_t f, int64_t width, T* grad) {
  const T* coef = static_cast<const T*>(term.coef);
  const E* source = static_cast<const E*>(term.source);
  RowBatch<E> batch;
  for (int32_t j = term.offsets[f]; j < term.offsets[f + 1]; ++j) {
    batch.add(source + static_cast<int64_t>(term.rows[j]) * width, coef[term.entries[j]]);
    if (batch.full()) add_rows(batch, width, grad, grad);
  }
  add_rows(batch, width, grad, grad);
}

template <class T>
void add_ones(const Term& term, int64_t f, int64_t width, T* grad) {
  const T* coef = static_cast<const T*>(term.coef);
  T sum{0};
  for (int32_t j = term.offsets[f]; j < term.offsets[f + 1]; ++j) sum += coef[term.entries[j]];
  for (int64_t d = 0; d < width; ++d) grad[d] += sum;
}

template <class T>
void add_terms(const Term* terms, int64_t n, int64_t f, int64_t width, T* grad) {
  for (const Term* term = terms; term < terms + n; ++term) {
    if (term->offsets[f] == term->offsets[f + 1]) continue;
    if (!term->source) {
      add_ones(*term, f, width, grad);
    } else if constexpr (sizeof(T) == 8) {
      add_term<T, double>(*term, f, width, grad);
    } else if (term->source_dtype == DType::f32) {
      add_term<T, float>(*term, f, width, grad);
    } else if (term->source_dtype == DType::bf16) {
      add_term<T, bf16>(*term, f, width, grad);
    } else {
      add_term<T, f16>(*term, f, width, grad);
    }
  }
}

template <class T>
void row_grad(const RowGradArgs& a) {
  T* out = static_cast<T*>(a.out);
  parallel_for(a.F, 64, a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t f = begin; f < end; ++f) {
      std::memset(out + f * a.width, 0, static_cast<size_t>(a.width) * sizeof(T));
      add_terms(a.terms, a.n_terms, f, a.width, out + f * a.width);
    }
  });
}

// Derived in double and rounded once: of beta2 = 0.999 in fp32, 1 - beta2 is 1.3e-5 too small.
template <class T>
struct AdamRates {
  T clip, step, v_scale, beta1, rest1, beta2, rest2, eps;

  explicit AdamRates(const RowUpdateArgs& a)
      : clip(static_cast<T>(a.hyper[1])),
        step(static_cast<T>(a.hyper[0] / a.hyper[2])),
        v_scale(static_cast<T>(1 / std::sqrt(a.hyper[3]))),
        beta1(static_cast<T>(a.beta1)),
        rest1(static_cast<T>(1 - a.beta1)),
        beta2(static_cast<T>(a.beta2)),
        rest2(static_cast<T>(1 - a.beta2)),
        eps(static_cast<T>(a.eps)) {}
};

// The update of one layout. Param is how weights lie in memory: the accumulator type, or low_half
// with the high halves in `copy`. Moment is how m and v do: the accumulator type, or high_half,
// which is rounded stochastically. All layouts share the arithmetic, so that they differ by nothing
// else.
template <class Param, class Moment>
class RowUpdate {
  using T = Acc<Param>;
  static constexpr bool kSplit = std::is_same_v<Param, low_half>;
  static constexpr bool kRounded = !std::is_same_v<Moment, T>;

 public:
  explicit RowUpdate(const RowUpdateArgs& args) : a(args), rates(args) {}

  void run() const {
    if (!a.sqnorm && a.hyper[4] != 0) return;
    parallel_for(a.F, kChunk, a.threads, [&](int64_t begin, int64_t end, int thread) {
      if constexpr (!kSplit && !kRounded) {
        if (a.width == 1 && a.norm == Norm::none && !a.lazy) return update_column(begin, end);
      }
      T* grad = static_cast<T*>(a.workspace) + thread * 2 * a.width;
      for (int64_t f = begin; f < end; ++f) update_row(f, grad, grad + a.width);
    });
  }

 private:
  static constexpr int64_t kChunk = 64;  // of rows

  const RowUpdateArgs& a;
  const AdamRates<T> rates;

  // Of rows of one number each Adam takes whole vectors.
  void update_column(int64_t begin, int64_t end) const {
    T grads[kChunk];
    for (int64_t f = begin; f < end; ++f) {
      gather(f, static_cast<const T*>(a.param) + f, grads + (f - begin));
    }
    if (!a.sqnorm) {
      adam(begin, 0, end - begin, static_cast<const T*>(a.param) + begin, grads);
      return;
    }
    for (int64_t f = begin; f < end; ++f) {
      static_cast<T*>(a.sqnorm)[f] = grads[f - begin] * grads[f - begin];
    }
  }

  void update_row(int64_t f, T* grad, T* joint) const {
    if (a.lazy && !a.sqnorm && !touched(f)) return;
    const T* row = weights(f, joint);
    gather(f, row, grad);
    const int64_t slice = a.width / a.slices;
    T squares{0};
    for (int64_t d = 0; d < a.width; d += slice) {
      if (a.norm == Norm::unit) project(grad + d, row + d, slice);
      if (a.sqnorm) {
        squares += dot(grad + d, grad + d, slice);
      } else {
        renormalise(f * a.width + d, slice, grad + d, adam(f, d, slice, row + d, grad + d));
      }
    }
    if (a.sqnorm) static_cast<T*>(a.sqnorm)[f] = squares;
  }

  bool touched(int64_t f) const {
    for (int64_t i = 0; i < a.n_terms; ++i) {
      if (a.terms[i].offsets[f] != a.terms[i].offsets[f + 1]) return true;
    }
    if (a.dense_grad && a.dense_slot[f] >= 0) return true;
    for (int64_t i = 0; a.row_coef && i < a.row_parts; ++i) {
      if (static_cast<const T*>(a.row_coef)[f * a.row_parts + i] != T{0}) return true;
    }
    return false;
  }

  // A row's weights where they lie, or joined from their halves.
  const T* weights(int64_t f, [[maybe_unused]] T* joint) const {
    const Param* param = static_cast<const Param*>(a.param) + f * a.width;
    if constexpr (kSplit) {
      if (a.sqnorm && a.norm != Norm::unit && !a.row_coef) return nullptr;  // nobody will look
      const high_half* high = static_cast<const high_half*>(a.copy) + f * a.width;
      for_each_vector<T>(a.width, [&](auto get, auto put) SAE_INLINE_LAMBDA {
        put(joint, added(get(high), get(param)));
      });
      return joint;
    } else {
      return param;
    }
  }

  void gather(int64_t f, const T* row, T* grad) const {
    std::memset(grad, 0, static_cast<size_t>(a.width) * sizeof(T));
    add_terms(a.terms, a.n_terms, f, a.width, grad);
    if (a.dense_grad && a.dense_slot[f] >= 0) {
      add_scaled(grad, static_cast<const T*>(a.dense_grad) + a.dense_slot[f] * a.width, T{1},
                 a.width);
    }
    if (!a.row_coef) return;
    const int64_t part = a.width / a.row_parts;
    for (int64_t i = 0; i < a.row_parts; ++i, grad += part, row += part) {
      const T coef = static_cast<const T*>(a.row_coef)[f * a.row_parts + i];
      if (coef == T{0}) continue;
      const T norm = std::sqrt(dot(row, row, part));
      if (norm > T{0}) add_scaled(grad, row, coef / norm, part);
    }
  }

  static void add_scaled(T* out, const T* row, T scale, int64_t width) {
    for_each_vector<T>(width, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      put(out, get(out) + splat(scale) * get(row));
    });
  }

  // The part of the gradient along a unit row only changes its length, which renormalising undoes.
  static void project(T* grad, const T* row, int64_t width) {
    add_scaled(grad, row, -dot(grad, row, width), width);
  }

  SAE_INLINE void prefetch(int64_t at) const {
    __builtin_prefetch(static_cast<const Moment*>(a.m) + at);
    __builtin_prefetch(static_cast<const Moment*>(a.v) + at);
    __builtin_prefetch(static_cast<const Param*>(a.param) + at);
    if (a.copy) __builtin_prefetch(static_cast<const high_half*>(a.copy) + at);
  }

  // Returns the squared norm of the updated slice; renormalise() finds the slice in `grad`.
  T adam(int64_t f, int64_t d, int64_t width, const T* row, T* grad) const {
    const int64_t at = f * a.width + d;
    Moment* m = static_cast<Moment*>(a.m) + at;
    Moment* v = static_cast<Moment*>(a.v) + at;
    [[maybe_unused]] Noise noise(kRounded ? a.hyper[5] : 0, f, d);
    const AdamRates<T> r = rates;  // a copy, which no store can change
    Vec<T> squares{};
    // The next row's numbers travel while this row's are worked on, unless it may be left alone.
    int64_t next = at + (a.lazy || f + 1 == a.F ? 0 : a.width);
    for_each_vector<T>(width, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      prefetch(next);
      next += kLanes<T>;
      const Vec<T> g = get(grad) * splat(r.clip);
      const Vec<T> m1 = splat(r.beta1) * get(m) + splat(r.rest1) * g;
      const Vec<T> v1 = splat(r.beta2) * get(v) + splat(r.rest2) * (g * g);
      const Vec<T> p =
          get(row) - splat(r.step) * m1 / (square_root<T>(v1) * splat(r.v_scale) + splat(r.eps));
      squares += p * p;
      if constexpr (kRounded) {
        const Vec<uint32_t> bits = noise.next();
        put(m, added(with_one_nan(m1), bits & 0xffffu));
        put(v, added(with_one_nan(v1), bits >> 16));
      } else {
        put(m, m1);
        put(v, v1);
      }
      a.norm == Norm::none ? put_weights(put, at, p) : put(grad, p);
    });
    return horizontal_sum<T>(squares);
  }

  void renormalise(int64_t at, int64_t width, const T* row, T squares) const {
    if (a.norm == Norm::none) return;
    const T norm = std::sqrt(squares);
    const bool keep = !(norm > T{0}) || (a.norm == Norm::at_most_one && norm <= T{1});
    const T scale = keep ? T{1} : T{1} / norm;
    for_each_vector<T>(width, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      put_weights(put, at, get(row) * splat(scale));
    });
  }

  template <class Put>
  SAE_INLINE void put_weights(Put put, int64_t at, Vec<T> p) const {
    if constexpr (kSplit) {
      p = with_one_nan(p);
      put(static_cast<high_half*>(a.copy) + at, added(p, splat(0x8000u)));
    }
    put(static_cast<Param*>(a.param) + at, p);
    if constexpr (!kSplit && sizeof(T) == 4) {
      if (!a.copy) return;
      a.copy_dtype == DType::f16 ? put(static_cast<f16*>(a.copy) + at, p)
                                 : put(static_cast<bf16*>(a.copy) + at, p);
    }
  }
};

}  // namespace sae::SAE_ISA
