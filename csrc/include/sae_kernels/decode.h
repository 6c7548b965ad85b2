// decode and code_grad: per token, sums of and dot products with the K selected decoder rows.
#pragma once

#include <atomic>

#include "sae_kernels/gather.h"
#include "sae_kernels/parallel.h"

namespace sae::SAE_ISA {

// A latent's group is the first whose end lies above it; without ends there is one group.
SAE_INLINE int64_t group_of(int32_t latent, const int32_t* ends, int64_t groups) {
  int64_t g = 0;
  while (g + 1 < groups && latent >= ends[g]) ++g;
  return g;
}

template <class E>
struct Decode {
  using T = Acc<E>;
  const DecodeArgs& a;
  const T* values = static_cast<const T*>(a.values);
  const E* W = static_cast<const E*>(a.W);

  bool run() const {
    std::atomic<bool> in_range{true};
    parallel_for(a.B, 8, a.threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t token = begin; token < end; ++token) {
        if (!check(token)) {
          in_range = false;
          return;
        }
        reconstruct(token);
        if (a.target) residual(token);
      }
    });
    return in_range;
  }

 private:
  bool check(int64_t token) const {
    for (int64_t j = token * a.K; j < (token + 1) * a.K; ++j) {
      if (a.indices[j] < 0 || a.indices[j] >= a.F) return false;
    }
    return true;
  }

  // Group g's output is the sum over all latents of groups 0 .. g.
  void reconstruct(int64_t token) const {
    T* previous = nullptr;
    for (int64_t g = 0; g < a.G; ++g) {
      T* out = static_cast<T*>(a.out) + (g * a.B + token) * a.D;
      start(out, previous);
      RowBatch<E> batch;
      for (int64_t j = token * a.K; j < (token + 1) * a.K; ++j) {
        if (values[j] == T{0}) continue;  // a dropped entry adds nothing, whatever its row holds
        const int64_t latent = a.indices[j];
        if (a.G > 1 && group_of(a.indices[j], a.group_ends, a.G) != g) continue;
        batch.add(W + latent * a.D, values[j]);
        if (batch.full()) add_rows(batch, a.D, out, out);
      }
      add_rows(batch, a.D, out, out);
      previous = out;
    }
  }

  void start(T* out, const T* previous) const {
    const T* from = previous ? previous : static_cast<const T*>(a.b_dec);
    const size_t bytes = static_cast<size_t>(a.D) * sizeof(T);
    if (from) {
      std::memcpy(out, from, bytes);
    } else {
      std::memset(out, 0, bytes);
    }
  }

  // The decoder rows are still in cache: their dot products with the residual cost no traffic.
  void residual(int64_t token) const {
    T* e = static_cast<T*>(a.out) + token * a.D;
    const T* target = static_cast<const T*>(a.target) + token * a.D;
    Vec<T> squares{};
    for_each_vector<T>(a.D, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      const Vec<T> difference = get(e) - get(target);
      squares += difference * difference;
      put(e, difference);
    });
    static_cast<T*>(a.sse)[token] = horizontal_sum<T>(squares);
    T* grad = static_cast<T*>(a.code_grad);
    for (int64_t j = token * a.K; j < (token + 1) * a.K; ++j) {
      const bool dropped = a.drop_zeros && values[j] == T{0};
      grad[j] = dropped ? T{0} : dot(e, W + static_cast<int64_t>(a.indices[j]) * a.D, a.D);
    }
  }
};

template <class E>
bool code_grad(const CodeGradArgs& a) {
  using T = Acc<E>;
  const E* W = static_cast<const E*>(a.W);
  std::atomic<bool> in_range{true};
  parallel_for(a.B, 8, a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin * a.K; j < end * a.K; ++j) {
      const int32_t latent = a.indices[j];
      if (latent < 0 || latent >= a.F) {
        in_range = false;
        return;
      }
      const int64_t g = a.G > 1 ? group_of(latent, a.group_ends, a.G) : 0;
      const T* grad = static_cast<const T*>(a.grad) + (g * a.B + j / a.K) * a.D;
      static_cast<T*>(a.out)[j] = dot(grad, W + static_cast<int64_t>(latent) * a.D, a.D);
    }
  });
  return in_range;
}

}  // namespace sae::SAE_ISA
