// select_topk on the host.
#include "sae_kernels/select_topk.h"

#include "products.h"
#include "sae_kernels/few_narrow_topk.h"
#include "sae_kernels/few_topk.h"
#include "tables.h"

namespace sae::SAE_ISA {

template <RankedBy kBy, class Visit>
static auto visit_ranked(const SelectTopkArgs& args, const Visit& visit) {
  return visit_product(args.dtype, [&](auto product) {
    using Product = decltype(product);
    using E = typename Product::Element;
    if constexpr (FewTokens<E>::template kServes<Product>) {
      if constexpr (kBy != RankedBy::magnitude) {
        constexpr bool kScaled = kBy == RankedBy::scaled;
        if (args.narrow && FewNarrow<E>::pays(args.B, args.D)) {
          return visit(FewNarrowTopk<E, kScaled>(args));
        }
      }
      if (FewTokens<E>::pays(args.B, args.screening)) return visit(FewTopk<E, kBy>(args));
    }
    return visit(SelectTopk<Product, kBy>(args));
  });
}

template <class Visit>
static auto visit_topk(const SelectTopkArgs& args, const Visit& visit) {
  if (args.by_magnitude) return visit_ranked<RankedBy::magnitude>(args, visit);
  return args.rank_scale ? visit_ranked<RankedBy::scaled>(args, visit)
                         : visit_ranked<RankedBy::score>(args, visit);
}

size_t select_topk_workspace(const SelectTopkArgs& args) {
  return visit_topk(args, [](const auto& select) { return select.workspace(); });
}

bool can_screen(const CanScreenArgs& args) { return Int8Product::runs(args.screening); }

bool select_topk(const SelectTopkArgs& args) {
  return visit_topk(args, [](const auto& select) { return select.run(); });
}

}  // namespace sae::SAE_ISA
