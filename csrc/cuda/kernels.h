// Every kernel of this folder by name, for tables of them: define SAE_CUDA_KERNEL first.
SAE_CUDA_KERNEL(select_tile)
SAE_CUDA_KERNEL(select_tile_scaled)
SAE_CUDA_KERNEL(transpose_count)
SAE_CUDA_KERNEL(transpose_sum)
SAE_CUDA_KERNEL(transpose_move)
SAE_CUDA_KERNEL(transpose_index)
