// transpose_codes: a stable counting sort of the selected entries by latent.
//
// Each thread counts its own stretch of entries; the scan over (latent, thread) then gives every
// thread its own places, so the order is by latent and by entry within it for any thread count.
#pragma once

#include <algorithm>
#include <atomic>

#include "sae_kernels/parallel.h"

namespace sae::SAE_ISA {

template <class T>
bool transpose_codes(const TransposeArgs& a) {
  constexpr int64_t kWorthAThread = 1 << 13;  // entries: waking one takes longer than fewer
  const T* values = static_cast<const T*>(a.values);
  const int threads = static_cast<int>(std::clamp<int64_t>(a.N / kWorthAThread, 1, a.threads));
  const int64_t stretch = (a.N + threads - 1) / threads;
  const auto for_each_entry = [&](int thread, auto&& body) {
    const int64_t end = std::min(a.N, (thread + 1) * stretch);
    for (int64_t e = thread * stretch; e < end; ++e) {
      body(e, a.indices[e], !(a.drop_zeros && values[e] == T{0}));
    }
  };

  std::atomic<bool> in_range{true};
  on_threads(threads, [&](int thread) {
    int32_t* counts = a.workspace + thread * a.F;
    std::fill(counts, counts + a.F, 0);
    for_each_entry(thread, [&](int64_t, int32_t latent, bool kept) {
      if (latent < 0 || latent >= a.F) {
        in_range = false;
      } else {
        counts[latent] += kept;
      }
    });
  });
  if (!in_range) return false;

  int32_t total = 0;
  for (int64_t f = 0; f < a.F; ++f) {
    a.offsets[f] = total;
    for (int thread = 0; thread < threads; ++thread) {
      int32_t& place = a.workspace[thread * a.F + f];
      const int32_t count = place;
      place = total;
      total += count;
    }
  }
  a.offsets[a.F] = total;

  on_threads(threads, [&](int thread) {
    int32_t* places = a.workspace + thread * a.F;
    for_each_entry(thread, [&](int64_t e, int32_t latent, bool kept) {
      if (!kept) return;
      const int32_t place = places[latent]++;
      a.entries[place] = static_cast<int32_t>(e);
      a.rows[place] = a.row_ids ? a.row_ids[e] : static_cast<int32_t>(e / a.entries_per_row);
    });
  });
  return true;
}

}  // namespace sae::SAE_ISA
