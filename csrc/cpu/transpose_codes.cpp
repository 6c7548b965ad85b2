// transpose_codes on the host.
#include "sae_kernels/transpose_codes.h"

#include "tables.h"

namespace sae::SAE_ISA {

bool transpose_codes(const TransposeArgs& args) {
  return args.dtype == DType::f64 ? transpose_codes<double>(args) : transpose_codes<float>(args);
}

}  // namespace sae::SAE_ISA
