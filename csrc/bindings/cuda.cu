// All of csrc/cuda as one translation unit, and the table that finds a kernel by its name.
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "../cuda/select_tile.cu"
#include "../cuda/transpose_codes.cu"
#include "cuda.h"

namespace sae {
namespace {

struct Kernel {
  const void* function;
  size_t parameters;
};

template <class... Parameters>
Kernel kernel_of(void (*function)(Parameters...)) {
  static_assert(((sizeof(Parameters) == sizeof(int64_t)) && ...), "a parameter is a 64-bit word");
  return {reinterpret_cast<const void*>(function), sizeof...(Parameters)};
}

const std::unordered_map<std::string, Kernel>& kernels() {
  static const std::unordered_map<std::string, Kernel> table = {
#define SAE_CUDA_KERNEL(name) {#name, kernel_of(&::name)},
#include "../cuda/kernels.h"
#undef SAE_CUDA_KERNEL
  };
  return table;
}

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string explain(cudaError_t error) {
  int driver = 0, toolkit = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&toolkit);
  const std::string said = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      if (driver == 0) return said + "; no NVIDIA driver was found: install one";
      return said + "; the driver is for CUDA " + version(driver) +
             " and the kernels were built with CUDA " + version(toolkit) +
             ": update the NVIDIA driver, or build sae_kernels again with an older CUDA toolkit";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return said + "; the kernels were built for " SAE_CUDA_ARCHS
                    ": build sae_kernels again with this GPU's architecture in the environment "
                    "variable CUDAARCHS (for example CUDAARCHS=90 for compute capability 9.0)";
    default:
      return said;
  }
}

// The thread's device is the caller's; it is put back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (error == cudaSuccess) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
};

}  // namespace

std::string cuda_reason(int device) {
  const DeviceGuard guard(device);
  cudaError_t error = guard.error;
  cudaFuncAttributes attributes;
  // Looks for the kernel's image for this device, so it fails as a launch would.
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, kernels().begin()->second.function);
  }
  return error == cudaSuccess ? "" : explain(error);
}

void cuda_launch(const std::string& name, int device, int64_t grid, int64_t block,
                 int64_t shared_bytes, uintptr_t stream, const std::vector<int64_t>& words) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::runtime_error("there is no CUDA kernel '" + name + "'");
  const Kernel& kernel = found->second;
  if (words.size() != kernel.parameters) {
    throw std::runtime_error(name + ": expected " + std::to_string(kernel.parameters) +
                             " arguments, got " + std::to_string(words.size()));
  }
  std::vector<void*> arguments;
  for (const int64_t& word : words) arguments.push_back(const_cast<int64_t*>(&word));

  const DeviceGuard guard(device);
  cudaError_t error = guard.error;
  // The limit of shared memory is the function's, whichever thread set it: a launch follows its
  // own.
  static std::mutex limit;
  const std::lock_guard<std::mutex> held(limit);
  constexpr int64_t kDefaultSharedBytes = 48 << 10;
  if (error == cudaSuccess && shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    error =
        cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(grid)),
                         dim3(static_cast<unsigned>(block)), arguments.data(),
                         static_cast<size_t>(shared_bytes), reinterpret_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears it, so that the next call does not report it again
    throw std::runtime_error(name + " on device " + std::to_string(device) +
                             " cannot be launched: " + explain(error));
  }
}

}  // namespace sae
