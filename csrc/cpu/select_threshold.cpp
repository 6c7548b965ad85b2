// select_threshold on the host.
#include "sae_kernels/select_threshold.h"

#include "bf16_product.h"
#include "tables.h"

namespace sae::SAE_ISA {

template <class Visit>
static auto visit_select(const SelectThresholdArgs& args, const Visit& visit) {
  switch (args.dtype) {
    case DType::f64:
      return visit(SelectThreshold<FmaProduct<double>>(args));
    case DType::bf16:
      return visit(SelectThreshold<Bf16Product>(args));
    case DType::f16:
      return visit(SelectThreshold<FmaProduct<f16>>(args));
    default:
      return visit(SelectThreshold<FmaProduct<float>>(args));
  }
}

size_t select_threshold_workspace(const SelectThresholdArgs& args) {
  return visit_select(args, [](const auto& select) { return select.workspace(); });
}

std::unique_ptr<Selection> select_threshold(const SelectThresholdArgs& args) {
  return visit_select(args, [](const auto& select) { return select.run(); });
}

}  // namespace sae::SAE_ISA
