// Which tile product serves which operand type; AMX for bf16 where the ISA has it.
#pragma once

#include "sae_kernels/product_amx.h"
#include "sae_kernels/product_fma.h"

namespace sae::SAE_ISA {

#if defined(__AMX_BF16__)
using Bf16Product = AmxProduct;
#else
using Bf16Product = FmaProduct<bf16>;
#endif

// Calls visit with the product of the type; a product has no state, its type is what counts.
template <class Visit>
auto visit_product(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::f64:
      return visit(FmaProduct<double>{});
    case DType::bf16:
      return visit(Bf16Product{});
    case DType::f16:
      return visit(FmaProduct<f16>{});
    default:
      return visit(FmaProduct<float>{});
  }
}

}  // namespace sae::SAE_ISA
