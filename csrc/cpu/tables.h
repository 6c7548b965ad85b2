// The entry points that every source of this folder defines once per ISA, and the table of them.
#pragma once

#include "sae_kernels/simd.h"

namespace sae {

namespace SAE_ISA {
size_t select_topk_workspace(const SelectTopkArgs&);
bool select_topk(const SelectTopkArgs&);
size_t route_top1_workspace(const RouteTop1Args&);
void route_top1(const RouteTop1Args&);
size_t select_threshold_workspace(const SelectThresholdArgs&);
std::unique_ptr<Selection> select_threshold(const SelectThresholdArgs&);
bool decode(const DecodeArgs&);
bool code_grad(const CodeGradArgs&);
bool transpose_codes(const TransposeArgs&);
void row_grad(const RowGradArgs&);
void row_update(const RowUpdateArgs&);
const KernelTable& table();
}  // namespace SAE_ISA

}  // namespace sae
