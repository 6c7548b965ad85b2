// select_topk on the host: which tile product serves which operand type.
#include "sae_kernels/select_topk.h"

#include "bf16_product.h"
#include "tables.h"

namespace sae::SAE_ISA {

template <class Product, class Visit>
static auto visit_scaled(const SelectTopkArgs& args, const Visit& visit) {
  return args.rank_scale ? visit(SelectTopk<Product, true>(args))
                         : visit(SelectTopk<Product, false>(args));
}

template <class Visit>
static auto visit_select(const SelectTopkArgs& args, const Visit& visit) {
  switch (args.dtype) {
    case DType::f64:
      return visit_scaled<FmaProduct<double>>(args, visit);
    case DType::bf16:
      return visit_scaled<Bf16Product>(args, visit);
    case DType::f16:
      return visit_scaled<FmaProduct<f16>>(args, visit);
    default:
      return visit_scaled<FmaProduct<float>>(args, visit);
  }
}

size_t select_topk_workspace(const SelectTopkArgs& args) {
  return visit_select(args, [](const auto& select) { return select.workspace(); });
}

void select_topk(const SelectTopkArgs& args) {
  visit_select(args, [](const auto& select) { select.run(); });
}

}  // namespace sae::SAE_ISA
