// Loops over independent rows. Who runs which chunk is left to chance, what a row computes is not:
// every row is one task with its own order of sums, so results do not depend on the thread count.
#pragma once

#include <atomic>
#include <cstdint>
#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

#include "sae_kernels/simd.h"

namespace sae::SAE_ISA {

// Runs body(thread) on `threads` threads. OpenMP shares torch's pool (one libgomp, one set of
// threads); std::thread is for toolchains without it.
template <class Body>
void on_threads(int threads, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) body(thread);
#else
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread)
    others.emplace_back([&, thread] { body(thread); });
  body(0);
  for (auto& other : others) other.join();
#endif
}

// Runs body(begin, end, thread) over [0, n) in chunks of `grain`, handed out as threads get free.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  const int64_t chunks = (n + grain - 1) / grain;
  const int used = static_cast<int>(chunks < threads ? chunks : threads);
  if (used <= 1) {
    for (int64_t i = 0; i < n; i += grain) body(i, i + grain < n ? i + grain : n, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  on_threads(used, [&](int thread) {
    for (int64_t i; (i = next.fetch_add(grain)) < n;) {
      body(i, i + grain < n ? i + grain : n, thread);
    }
  });
}

}  // namespace sae::SAE_ISA
