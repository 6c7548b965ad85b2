#include "select_tile.cuh"

#define SAE_SELECT_TILE(name, scaled)                                                              \
  extern "C" __global__ void __launch_bounds__(sae::kSelectThreads) name(                          \
      const float* scores, i64 stride, const float* bias, const float* rank_scale, u64* best_keys, \
      u32* best_values, u32* values, int* indices, i64 first, i64 width, i64 k, i64 capacity) {    \
    sae::fold_tile<scaled>({scores, stride, bias, rank_scale, best_keys, best_values, values,      \
                            indices, first, width, k, capacity});                                  \
  }

SAE_SELECT_TILE(select_tile, false)
SAE_SELECT_TILE(select_tile_scaled, true)
