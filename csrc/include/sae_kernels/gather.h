// Sums and dot products of gathered rows, the inner loops of everything after the encoder.
#pragma once

#include "sae_kernels/simd.h"

namespace sae::SAE_ISA {

// A few weighted rows, collected first so that the loop over them is tight and can look ahead.
template <class E>
struct RowBatch {
  static constexpr int kCapacity = 64;
  const E* row[kCapacity + 1];  // one more, so that looking ahead needs no branch
  Acc<E> coef[kCapacity];
  int n = 0;

  bool full() const { return n == kCapacity; }
  SAE_INLINE void add(const E* r, Acc<E> c) {
    row[n] = r;
    coef[n++] = c;
  }
};

template <int kVectors, class E>
SAE_INLINE void add_rows_chunk(RowBatch<E>& batch, int64_t d, const Acc<E>* from, Acc<E>* out) {
  using T = Acc<E>;
  Vec<T> sum[kVectors];
  SAE_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] = load(from + d + v * kLanes<T>);
  for (int j = 0; j < batch.n; ++j) {
    const E* row = batch.row[j] + d;
    const E* ahead = batch.row[j + 1] + d;
    const Vec<T> coef = splat(batch.coef[j]);
    constexpr int kBytes = kVectors * kLanes<T> * static_cast<int>(sizeof(E));
    SAE_UNROLL for (int line = 0; line < kBytes; line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(ahead) + line);
    }
    SAE_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] += coef * load(row + v * kLanes<T>);
  }
  SAE_UNROLL for (int v = 0; v < kVectors; ++v) store(out + d + v * kLanes<T>, sum[v]);
}

// out = from + sum of coef * row, the rows in order for every element. `from` may be `out`.
template <class E>
void add_rows(RowBatch<E>& batch, int64_t width, const Acc<E>* from, Acc<E>* out) {
  using T = Acc<E>;
  constexpr int kVectors = 8;
  if (batch.n) batch.row[batch.n] = batch.row[batch.n - 1];
  int64_t d = 0;
  for (; d + kVectors * kLanes<T> <= width; d += kVectors * kLanes<T>) {
    add_rows_chunk<kVectors>(batch, d, from, out);
  }
  for (; d + kLanes<T> <= width; d += kLanes<T>) add_rows_chunk<1>(batch, d, from, out);
  if (const int64_t n = width - d; n > 0) {
    Vec<T> sum = load_tail(from + d, n);
    for (int j = 0; j < batch.n; ++j) {
      sum += splat(batch.coef[j]) * load_tail(batch.row[j] + d, n);
    }
    store_tail(out + d, sum, n);
  }
  batch.n = 0;
}

template <class E>
SAE_INLINE Acc<E> dot(const Acc<E>* x, const E* row, int64_t width) {
  using T = Acc<E>;
  constexpr int kVectors = 4;
  Vec<T> sum[kVectors] = {};
  int64_t d = 0;
  for (; d + kVectors * kLanes<T> <= width; d += kVectors * kLanes<T>) {
    SAE_UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[v] += load(x + d + v * kLanes<T>) * load(row + d + v * kLanes<T>);
    }
  }
  for (; d + kLanes<T> <= width; d += kLanes<T>) sum[0] += load(x + d) * load(row + d);
  if (d < width) sum[1] += load_tail(x + d, width - d) * load_tail(row + d, width - d);
  return horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace sae::SAE_ISA
