// row_grad and row_update: everything that happens to a latent's row of a weight matrix.
//
// The gradient of a row is a short weighted sum of rows of x or of the residual. It is gathered
// into one cache-resident buffer and used up at once: projection, Adam, renormalisation and the
// compute copy happen before the next row is touched, so gradients never reach memory.
#pragma once

#include "sae_kernels/gather.h"
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

// Returns whether any entry of the latent was there.
template <class T>
bool add_terms(const Term* terms, int64_t n, int64_t f, int64_t width, T* grad) {
  bool any = false;
  for (const Term* term = terms; term < terms + n; ++term) {
    if (term->offsets[f] == term->offsets[f + 1]) continue;
    any = true;
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
  return any;
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

template <class T, class Copy>
class RowUpdate {
 public:
  explicit RowUpdate(const RowUpdateArgs& args)
      : a(args),
        clip(static_cast<T>(a.hyper[1])),
        step(static_cast<T>(a.hyper[0] / a.hyper[2])),
        v_scale(static_cast<T>(1 / std::sqrt(a.hyper[3]))),
        beta1(static_cast<T>(a.beta1)),
        rest1(static_cast<T>(1 - a.beta1)),
        beta2(static_cast<T>(a.beta2)),
        rest2(static_cast<T>(1 - a.beta2)),
        eps(static_cast<T>(a.eps)) {}

  void run() const {
    if (!a.sqnorm && a.hyper[4] != 0) return;
    parallel_for(a.F, kChunk, a.threads, [&](int64_t begin, int64_t end, int thread) {
      if (a.width == 1 && a.norm == Norm::none && !a.lazy) return update_column(begin, end);
      T* grad = static_cast<T*>(a.workspace) + thread * a.width;
      for (int64_t f = begin; f < end; ++f) update_row(f, grad);
    });
  }

 private:
  static constexpr int64_t kChunk = 64;  // of rows

  const RowUpdateArgs& a;
  // Derived in double and rounded once: of beta2 = 0.999 in fp32, 1 - beta2 is 1.3e-5 too small.
  T clip, step, v_scale, beta1, rest1, beta2, rest2, eps;

  // Of rows of one number each Adam takes whole vectors.
  void update_column(int64_t begin, int64_t end) const {
    T grads[kChunk];
    for (int64_t f = begin; f < end; ++f) {
      gather(f, static_cast<const T*>(a.param) + f, grads + (f - begin));
    }
    if (!a.sqnorm) {
      adam(begin, end - begin, grads);
      return;
    }
    for (int64_t f = begin; f < end; ++f) {
      static_cast<T*>(a.sqnorm)[f] = grads[f - begin] * grads[f - begin];
    }
  }

  void update_row(int64_t f, T* grad) const {
    T* param = static_cast<T*>(a.param) + f * a.width;
    const int64_t slice = a.width / a.slices;
    const bool touched = gather(f, param, grad);
    if (a.lazy && !touched && !a.sqnorm) return;
    T squares{0};
    for (int64_t d = 0; d < a.width; d += slice) {
      if (a.norm == Norm::unit) project(grad + d, param + d, slice);
      if (a.sqnorm) {
        squares += dot(grad + d, grad + d, slice);
      } else {
        renormalise(f * a.width + d, slice, adam(f * a.width + d, slice, grad + d));
      }
    }
    if (a.sqnorm) static_cast<T*>(a.sqnorm)[f] = squares;
  }

  bool gather(int64_t f, const T* param, T* grad) const {
    std::memset(grad, 0, static_cast<size_t>(a.width) * sizeof(T));
    bool touched = add_terms(a.terms, a.n_terms, f, a.width, grad);
    if (a.dense_grad && a.dense_slot[f] >= 0) {
      add_scaled(grad, static_cast<const T*>(a.dense_grad) + a.dense_slot[f] * a.width, T{1},
                 a.width);
      touched = true;
    }
    if (!a.row_coef) return touched;
    const int64_t part = a.width / a.row_parts;
    for (int64_t i = 0; i < a.row_parts; ++i, grad += part, param += part) {
      const T coef = static_cast<const T*>(a.row_coef)[f * a.row_parts + i];
      if (coef == T{0}) continue;
      const T norm = std::sqrt(dot(param, param, part));
      if (norm > T{0}) add_scaled(grad, param, coef / norm, part);
      touched = true;
    }
    return touched;
  }

  static void add_scaled(T* out, const T* row, T scale, int64_t width) {
    for_each_vector<T>(width, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      put(out, get(out) + splat(scale) * get(row));
    });
  }

  // The part of the gradient along a unit row only changes its length, which renormalising undoes.
  static void project(T* grad, const T* param, int64_t width) {
    add_scaled(grad, param, -dot(grad, param, width), width);
  }

  // Returns the squared norm of the updated row.
  T adam(int64_t at, int64_t width, const T* grad) const {
    T* param = static_cast<T*>(a.param) + at;
    T* m = static_cast<T*>(a.m) + at;
    T* v = static_cast<T*>(a.v) + at;
    Vec<T> squares{};
    for_each_vector<T>(width, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      const Vec<T> g = get(grad) * splat(clip);
      const Vec<T> m1 = splat(beta1) * get(m) + splat(rest1) * g;
      const Vec<T> v1 = splat(beta2) * get(v) + splat(rest2) * (g * g);
      const Vec<T> p =
          get(param) - splat(step) * m1 / (square_root<T>(v1) * splat(v_scale) + splat(eps));
      squares += p * p;
      put(m, m1);
      put(v, v1);
      put(param, p);
      if (a.copy && a.norm == Norm::none) put_copy(put, at, p);
    });
    return horizontal_sum<T>(squares);
  }

  void renormalise(int64_t at, int64_t width, T squares) const {
    if (a.norm == Norm::none) return;
    const T norm = std::sqrt(squares);
    const bool keep = !(norm > T{0}) || (a.norm == Norm::at_most_one && norm <= T{1});
    const T scale = keep ? T{1} : T{1} / norm;
    T* param = static_cast<T*>(a.param) + at;
    for_each_vector<T>(width, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      const Vec<T> p = get(param) * splat(scale);
      put(param, p);
      if (a.copy) put_copy(put, at, p);
    });
  }

  template <class Put>
  SAE_INLINE void put_copy(Put put, int64_t at, Vec<T> p) const {
    if constexpr (sizeof(T) == 4) put(static_cast<Copy*>(a.copy) + at, p);
  }
};

}  // namespace sae::SAE_ISA
