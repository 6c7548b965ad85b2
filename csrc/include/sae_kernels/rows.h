// The rows of x that a block of tokens consists of: neighbours, or those of a list.
#pragma once

#include "sae_kernels/simd.h"

namespace sae::SAE_ISA {

struct Rows {
  const int32_t* list;  // null: row first + i is the i-th
  int64_t first;

  SAE_INLINE int64_t operator[](int64_t i) const { return list ? list[first + i] : first + i; }
};

// Whether the experts' parts of the list of tokens join, and every one of B tokens is in it; `seen`
// is scratch for B of them.
inline bool each_token_once(const Routes& routes, int64_t B, char* seen) {
  const auto [tokens, starts, experts] = routes;
  if (starts[0] != 0 || starts[experts] != B) return false;
  for (int64_t e = 0; e < experts; ++e) {
    if (starts[e] > starts[e + 1]) return false;
  }
  std::memset(seen, 0, static_cast<size_t>(B));
  for (int64_t i = 0; i < B; ++i) {
    if (tokens[i] < 0 || tokens[i] >= B || seen[tokens[i]]) return false;
    seen[tokens[i]] = 1;
  }
  return true;
}

}  // namespace sae::SAE_ISA
