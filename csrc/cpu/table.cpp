// One ISA's kernels, as the bindings call them.
#include "tables.h"

namespace sae::SAE_ISA {

const KernelTable& table() {
  static const KernelTable kernels = {
#define SAE_KERNEL(result, name, arguments) &name,
#include "sae_kernels/kernels.h"
  };
  return kernels;
}

}  // namespace sae::SAE_ISA
