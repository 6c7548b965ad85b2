// The rows of x that a block of tokens consists of: neighbours, or those of a list.
#pragma once

#include "sae_kernels/simd.h"

namespace sae::SAE_ISA {

struct Rows {
  const int32_t* list;  // null: row first + i is the i-th
  int64_t first;

  SAE_INLINE int64_t operator[](int64_t i) const { return list ? list[first + i] : first + i; }
};

}  // namespace sae::SAE_ISA
