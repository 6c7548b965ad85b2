// row_grad and row_update on the host.
#include "sae_kernels/row_update.h"

#include "tables.h"

namespace sae::SAE_ISA {

void row_grad(const RowGradArgs& args) {
  if (args.dtype == DType::f64) return row_grad<double>(args);
  return row_grad<float>(args);
}

void row_update(const RowUpdateArgs& args) {
  const bool rounded = args.moment_dtype == DType::bf16;
  if (args.param_dtype == DType::f64) return RowUpdate<double, double>(args).run();
  if (args.param_dtype == DType::i16) {
    return rounded ? RowUpdate<low_half, high_half>(args).run()
                   : RowUpdate<low_half, float>(args).run();
  }
  return rounded ? RowUpdate<float, high_half>(args).run() : RowUpdate<float, float>(args).run();
}

}  // namespace sae::SAE_ISA
