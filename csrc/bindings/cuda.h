// Launching the kernels that nvcc compiled into this module; only in a build that has them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sae {

// Every parameter of a kernel is one of `words`. Throws std::runtime_error with cause and remedy.
void cuda_launch(const std::string& kernel, int device, int64_t grid, int64_t block,
                 int64_t shared_bytes, uintptr_t stream, const std::vector<int64_t>& words);

// Why the kernels cannot run on a device, or an empty string.
std::string cuda_reason(int device);

}  // namespace sae
