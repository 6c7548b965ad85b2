// route_top1 on the host.
#include "sae_kernels/route_top1.h"

#include "products.h"
#include "tables.h"

namespace sae::SAE_ISA {

size_t route_top1_workspace(const RouteTop1Args& args) {
  return visit_product(
      args.dtype, [&](auto product) { return RouteTop1<decltype(product)>(args).workspace(); });
}

void route_top1(const RouteTop1Args& args) {
  visit_product(args.dtype, [&](auto product) { RouteTop1<decltype(product)>(args).run(); });
}

}  // namespace sae::SAE_ISA
