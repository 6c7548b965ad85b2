// select_topk on the host.
#include "sae_kernels/select_topk.h"

#include "products.h"
#include "sae_kernels/few_narrow_topk.h"
#include "sae_kernels/few_topk.h"
#include "tables.h"

namespace sae::SAE_ISA {

template <class Visit>
static auto visit_topk(const SelectTopkArgs& args, const Visit& visit) {
  return visit_product(args.dtype, [&](auto product) {
    using Product = decltype(product);
    using E = typename Product::Element;
    if constexpr (FewTokens<E>::template kServes<Product>) {
      if (args.narrow && FewNarrow<E>::pays(args.B, args.D)) {
        return args.rank_scale ? visit(FewNarrowTopk<E, true>(args))
                               : visit(FewNarrowTopk<E, false>(args));
      }
      if (FewTokens<E>::pays(args.B, args.screening)) {
        return args.rank_scale ? visit(FewTopk<E, true>(args)) : visit(FewTopk<E, false>(args));
      }
    }
    return args.rank_scale ? visit(SelectTopk<Product, true>(args))
                           : visit(SelectTopk<Product, false>(args));
  });
}

size_t select_topk_workspace(const SelectTopkArgs& args) {
  return visit_topk(args, [](const auto& select) { return select.workspace(); });
}

bool can_screen(const CanScreenArgs& args) { return Int8Product::runs(args.screening); }

bool select_topk(const SelectTopkArgs& args) {
  return visit_topk(args, [](const auto& select) { return select.run(); });
}

}  // namespace sae::SAE_ISA
