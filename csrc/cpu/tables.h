// The entry points that every source of this folder defines once per ISA, and the table of them.
#pragma once

#include "sae_kernels/simd.h"

namespace sae {

namespace SAE_ISA {
#define SAE_KERNEL(result, name, arguments) result name(const arguments&);
#include "sae_kernels/kernels.h"
const KernelTable& table();
}  // namespace SAE_ISA

}  // namespace sae
