// decode and code_grad: per token, sums of and dot products with the K selected decoder rows.
#pragma once

#include <atomic>
#include <cstdlib>

#include "sae_kernels/gather.h"
#include "sae_kernels/parallel.h"

namespace sae::SAE_ISA {

// A latent's group is the first whose end lies above it; without ends there is one group.
SAE_INLINE int64_t group_of(int32_t latent, const int32_t* ends, int64_t groups) {
  int64_t g = 0;
  while (g + 1 < groups && latent >= ends[g]) ++g;
  return g;
}

constexpr int64_t kMostBlocks = 64;  // of latents whose sums are added by themselves

// Memory of one thread. A std::vector of plain numbers would be one function for all ISAs.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n)
      : data(n ? static_cast<T*>(std::malloc(static_cast<size_t>(n) * sizeof(T))) : nullptr) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
};

// The entries of a token: K each, or between two offsets.
struct EntriesOf {
  const int32_t* offsets;
  int64_t K;
  SAE_INLINE int64_t begin(int64_t token) const { return offsets ? offsets[token] : token * K; }
};

template <class E>
struct Decode {
  using T = Acc<E>;
  const DecodeArgs& a;
  const T* values = static_cast<const T*>(a.values);
  const E* W = static_cast<const E*>(a.W);
  const EntriesOf entries{a.offsets, a.K};

  bool run() const {
    std::atomic<bool> in_range{true};
    parallel_for(a.B, 8, a.threads, [&](int64_t begin, int64_t end, int) {
      const Scratch<T> sums(a.blocks > 1 ? a.blocks * a.D : 0);
      for (int64_t token = begin; token < end; ++token) {
        const int64_t first = entries.begin(token), last = entries.begin(token + 1);
        if (!check(first, last)) {
          in_range = false;
          return;
        }
        if (a.blocks > 1) {
          reconstruct_by_blocks(token, first, last, sums.data);
        } else {
          reconstruct(token, first, last);
        }
        if (!a.target) continue;
        residuals(token);
        code_gradients(token, first, last);
      }
    });
    return in_range;
  }

 private:
  bool check(int64_t first, int64_t last) const {
    for (int64_t j = first; j < last; ++j) {
      if (a.indices[j] < 0 || a.indices[j] >= a.F) return false;
    }
    return true;
  }

  T* out_of(int64_t group, int64_t token) const {
    return static_cast<T*>(a.out) + (group * a.B + token) * a.D;
  }

  // Group g's output is the sum over all latents of groups 0 .. g.
  void reconstruct(int64_t token, int64_t first, int64_t last) const {
    T* previous = nullptr;
    for (int64_t g = 0; g < a.G; ++g) {
      T* out = out_of(g, token);
      start(out, previous);
      RowBatch<E> batch;
      for (int64_t j = first; j < last; ++j) {
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

  // The same with a sum for each of equal blocks of latents, which are added in the order of a
  // binary tree and before b_dec: whoever has which of the blocks, the bits are the same.
  void reconstruct_by_blocks(int64_t token, int64_t first, int64_t last, T* sums) const {
    std::memset(sums, 0, static_cast<size_t>(a.blocks * a.D) * sizeof(T));
    const int64_t width = a.F / a.blocks;
    for (int64_t g = 0; g < a.G; ++g) {
      RowBatch<E> batch;
      for (int64_t v = 0; v < a.blocks; ++v) {
        T* sum = sums + v * a.D;
        for (int64_t j = first; j < last; ++j) {
          const int64_t latent = a.indices[j];
          if (latent < v * width || latent >= (v + 1) * width || values[j] == T{0}) continue;
          if (a.G > 1 && group_of(a.indices[j], a.group_ends, a.G) != g) continue;
          batch.add(W + latent * a.D, values[j]);
          if (batch.full()) add_rows(batch, a.D, sum, sum);
        }
        if (batch.n) add_rows(batch, a.D, sum, sum);
      }
      add_blocks(sums, out_of(g, token));
    }
  }

  void add_blocks(const T* sums, T* out) const {
    const T* bias = static_cast<const T*>(a.b_dec);
    for_each_vector<T>(a.D, [&](auto get, auto put) SAE_INLINE_LAMBDA {
      Vec<T> part[kMostBlocks];
      for (int64_t v = 0; v < a.blocks; ++v) part[v] = get(sums + v * a.D);
      for (int64_t n = a.blocks; n > 1; n = (n + 1) / 2) {
        for (int64_t i = 0; i < n / 2; ++i) part[i] = part[2 * i] + part[2 * i + 1];
        if (n % 2) part[n / 2] = part[n - 1];
      }
      put(out, bias ? part[0] + get(bias) : part[0]);
    });
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

  // A latent of group g is in the prefixes g, g + 1, ...: in the place of each prefix goes the
  // weighted sum of its residual and of those after it.
  void residuals(int64_t token) const {
    const T* target = static_cast<const T*>(a.target) + token * a.D;
    const T* weights = static_cast<const T*>(a.group_weights);
    const T* later = nullptr;
    for (int64_t g = a.G - 1; g >= 0; --g) {
      T* e = out_of(g, token);
      const Vec<T> weight = splat(weights ? weights[g] : T{1});
      Vec<T> squares{};
      for_each_vector<T>(a.D, [&](auto get, auto put) SAE_INLINE_LAMBDA {
        const Vec<T> difference = get(e) - get(target);
        squares += difference * difference;
        put(e, later ? weight * difference + get(later) : weight * difference);
      });
      static_cast<T*>(a.sse)[g * a.B + token] = horizontal_sum<T>(squares);
      later = e;
    }
  }

  // The decoder rows are still in cache: their dot products with the residual cost no traffic.
  void code_gradients(int64_t token, int64_t first, int64_t last) const {
    T* grad = static_cast<T*>(a.code_grad);
    for (int64_t j = first; j < last; ++j) {
      const bool dropped = a.drop_zeros && values[j] == T{0};
      const int64_t g = a.G > 1 ? group_of(a.indices[j], a.group_ends, a.G) : 0;
      const E* row = W + static_cast<int64_t>(a.indices[j]) * a.D;
      grad[j] = dropped ? T{0} : dot(out_of(g, token), row, a.D);
    }
  }
};

template <class E>
bool code_grad(const CodeGradArgs& a) {
  using T = Acc<E>;
  const E* W = static_cast<const E*>(a.W);
  const EntriesOf entries{a.offsets, a.K};
  std::atomic<bool> in_range{true};
  parallel_for(a.B, 8, a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t j = entries.begin(token); j < entries.begin(token + 1); ++j) {
        const int32_t latent = a.indices[j];
        if (latent < 0 || latent >= a.F) {
          in_range = false;
          return;
        }
        const int64_t g = a.G > 1 ? group_of(latent, a.group_ends, a.G) : 0;
        const T* grad = static_cast<const T*>(a.grad) + (g * a.B + token) * a.D;
        static_cast<T*>(a.out)[j] = dot(grad, W + static_cast<int64_t>(latent) * a.D, a.D);
      }
    }
  });
  return in_range;
}

}  // namespace sae::SAE_ISA
