// select_threshold on the host.
#include "sae_kernels/select_threshold.h"

#include "products.h"
#include "tables.h"

namespace sae::SAE_ISA {

size_t select_threshold_workspace(const SelectThresholdArgs& args) {
  return visit_product(args.dtype, [&](auto product) {
    return SelectThreshold<decltype(product)>(args).workspace();
  });
}

std::unique_ptr<Selection> select_threshold(const SelectThresholdArgs& args) {
  return visit_product(args.dtype, [&](auto product) -> std::unique_ptr<Selection> {
    return SelectThreshold<decltype(product)>(args).run();
  });
}

}  // namespace sae::SAE_ISA
