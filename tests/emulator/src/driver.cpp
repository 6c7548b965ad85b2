// The part of the CUDA driver that Triton's launcher calls, and what the tests ask of the emulator.
#include <cuda.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>

#include "machine.h"

using namespace emulator;

namespace {

std::string last_error;
std::map<u64, u64> ranges;  // of tensors: begin, end
u64 seed = 0, limit = 100'000'000, launches = 0, instructions = 0;
bool idle = false;
int context;

CUresult failed(const std::string& why) {
  last_error = why.substr(0, 980);  // as much as the launcher's buffer takes
  return CUDA_ERROR_LAUNCH_FAILED;
}

CUresult launch(const Kernel& kernel, const u32 (&grid)[3], int threads, int shared,
                void** arguments) {
  ++launches;
  if (idle) return CUDA_SUCCESS;
  Launch made{
      {grid[0], grid[1], grid[2]}, threads, shared, std::vector<u8>(kernel.parameter_bytes + 8)};
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    std::memcpy(&made.parameters[kernel.parameters[i].offset], arguments[i],
                kernel.parameters[i].size);
  }
  try {
    if (threads % kLanes || threads > 1024 || (kernel.threads && threads != kernel.threads)) {
      throw Fault(kernel.name + " cannot be launched with blocks of " + std::to_string(threads));
    }
    Machine machine(kernel, std::move(made), ranges, seed * 1'000'003 + launches, limit);
    try {
      machine.run();
    } catch (...) {
      instructions += machine.executed();
      throw;
    }
    instructions += machine.executed();
    return CUDA_SUCCESS;
  } catch (const std::exception& error) {
    return failed("in " + kernel.name + ": " + error.what());
  }
}

}  // namespace

extern "C" {

// The kernel of that name in a module, or null.
void* emulator_load(const char* ptx, const char* name) {
  try {
    for (auto& kernel : load(ptx)) {
      if (kernel.name == name) return new Kernel(std::move(kernel));
    }
    failed(std::string("no kernel ") + name + " in this PTX");
  } catch (const std::exception& error) {
    failed(error.what());
  }
  return nullptr;
}

const char* emulator_error() { return last_error.c_str(); }
void emulator_seed(u64 value) { seed = value, launches = 0; }
void emulator_limit(u64 value) { limit = value; }
// Whether launches are counted only: what is left of a call is the host's work.
void emulator_idle(u64 value) { idle = value != 0; }
u64 emulator_launches() { return launches; }
u64 emulator_instructions() { return instructions; }
void emulator_forget_tensors() { ranges.clear(); }
void emulator_add_tensor(u64 begin, u64 bytes) {
  ranges[begin] = std::max(ranges[begin], begin + bytes);
}

// Words are 64-bit arguments, as the CUDA C++ kernels take them. Returns null or an error.
const char* emulator_launch(const void* kernel, u32 grid, int threads, int shared, u64* words,
                            int n) {
  const auto& own = *static_cast<const Kernel*>(kernel);
  if (static_cast<size_t>(n) != own.parameters.size()) return "wrong number of arguments";
  std::vector<void*> arguments;
  for (int i = 0; i < n; ++i) arguments.push_back(words + i);
  return launch(own, {grid, 1, 1}, threads, shared, arguments.data()) ? last_error.c_str()
                                                                      : nullptr;
}

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice) {
  return *made = reinterpret_cast<CUcontext>(&context), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* made) {
  return *made = reinterpret_cast<CUcontext>(&context), CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) {
  return *text = last_error.c_str(), CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  return *static_cast<CUdeviceptr*>(value) = pointer, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule*, const void*) { return CUDA_ERROR_NOT_FOUND; }
CUresult cuModuleGetFunction(CUfunction*, CUmodule, const char*) { return CUDA_ERROR_NOT_FOUND; }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) {
  return *value = 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
  return *value = 227 << 10, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  return *n = 1, CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* base, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  static const u32 kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
  std::memset(map, 0, sizeof(*map));
  if (rank != 2 || type >= sizeof(kBytes) / sizeof(*kBytes))
    return CUDA_SUCCESS;  // seen at its first use
  const TensorMap made{reinterpret_cast<u64>(base),
                       {sizes[0], sizes[1]},
                       strides[0],
                       {box[0], box[1]},
                       kBytes[type],
                       swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0u : 16u << swizzle,
                       TensorMap::kMagic};
  if (made.base % 16 || made.row_bytes % 16 || box[0] > 256 || box[1] > 256) {
    return failed("a tensor map of " + std::to_string(made.base % 16) +
                  " bytes beyond a multiple of 16, rows of " + std::to_string(made.row_bytes) +
                  " bytes and a box of " + std::to_string(box[0]) + " x " + std::to_string(box[1]));
  }
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void**) {
  const u32 grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  return launch(*reinterpret_cast<const Kernel*>(function), grid,
                static_cast<int>(config->blockDimX), static_cast<int>(config->sharedMemBytes),
                arguments);
}

}  // extern "C"
