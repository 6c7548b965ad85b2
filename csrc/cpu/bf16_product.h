// The tile product of bf16 operands: AMX where the ISA has it.
#pragma once

#include "sae_kernels/product_amx.h"
#include "sae_kernels/product_fma.h"

namespace sae::SAE_ISA {

#if defined(__AMX_BF16__)
using Bf16Product = AmxProduct;
#else
using Bf16Product = FmaProduct<bf16>;
#endif

}  // namespace sae::SAE_ISA
