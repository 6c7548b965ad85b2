// row_grad and row_update on the host.
#include "sae_kernels/row_update.h"

#include "tables.h"

namespace sae::SAE_ISA {

void row_grad(const RowGradArgs& args) {
  if (args.dtype == DType::f64) return row_grad<double>(args);
  return row_grad<float>(args);
}

void row_update(const RowUpdateArgs& args) {
  if (args.dtype == DType::f64) return RowUpdate<double, double>(args).run();
  if (args.copy_dtype == DType::f16) return RowUpdate<float, f16>(args).run();
  return RowUpdate<float, bf16>(args).run();
}

}  // namespace sae::SAE_ISA
