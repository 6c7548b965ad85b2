// select_threshold on the host.
#include "sae_kernels/select_threshold.h"

#include "products.h"
#include "sae_kernels/few_threshold.h"
#include "tables.h"

namespace sae::SAE_ISA {

template <class Visit>
static auto visit_threshold(const SelectThresholdArgs& args, const Visit& visit) {
  return visit_product(args.dtype, [&](auto product) {
    using Product = decltype(product);
    using E = typename Product::Element;
    if constexpr (FewTokens<E>::template kServes<Product>) {
      if (args.narrow && FewNarrow<E>::pays(args.B, args.D)) {
        return visit(FewThreshold<E, FewNarrow<E>>(args));
      }
      if (FewTokens<E>::pays(args.B, args.screening)) {
        return visit(FewThreshold<E, FewTokens<E>>(args));
      }
    }
    return visit(SelectThreshold<Product>(args));
  });
}

size_t select_threshold_workspace(const SelectThresholdArgs& args) {
  return visit_threshold(args, [](const auto& select) { return select.workspace(); });
}

std::unique_ptr<Selection> select_threshold(const SelectThresholdArgs& args) {
  return visit_threshold(args, [](const auto& select) { return select.run(); });
}

}  // namespace sae::SAE_ISA
