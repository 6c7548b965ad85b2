// Every host kernel: what it returns, its name and its arguments (types.h). The tables of kernels,
// their declarations and the bindings are made from this list: define SAE_KERNEL before including.
SAE_KERNEL(size_t, select_topk_workspace, SelectTopkArgs)
SAE_KERNEL(bool, select_topk, SelectTopkArgs)
SAE_KERNEL(size_t, route_top1_workspace, RouteTop1Args)
SAE_KERNEL(void, route_top1, RouteTop1Args)
SAE_KERNEL(size_t, select_threshold_workspace, SelectThresholdArgs)
SAE_KERNEL(std::unique_ptr<Selection>, select_threshold, SelectThresholdArgs)
SAE_KERNEL(bool, can_screen, CanScreenArgs)
SAE_KERNEL(bool, decode, DecodeArgs)
SAE_KERNEL(bool, code_grad, CodeGradArgs)
SAE_KERNEL(bool, transpose_codes, TransposeArgs)
SAE_KERNEL(void, row_grad, RowGradArgs)
SAE_KERNEL(void, row_update, RowUpdateArgs)
#undef SAE_KERNEL
