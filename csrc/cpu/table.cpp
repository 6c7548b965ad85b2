// One ISA's kernels, as the bindings call them.
#include "tables.h"

namespace sae::SAE_ISA {

const KernelTable& table() {
  static const KernelTable kernels = {
      &select_topk_workspace,
      &select_topk,
      &route_top1_workspace,
      &route_top1,
      &select_threshold_workspace,
      &select_threshold,
      &decode,
      &code_grad,
      &transpose_codes,
      &row_grad,
      &row_update,
  };
  return kernels;
}

}  // namespace sae::SAE_ISA
