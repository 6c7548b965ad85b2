// What all kernels share. No header is included: NVRTC has none of the host's.
//
// Every parameter of a kernel is a pointer or an i64, so that a launch is the same list of 8-byte
// words whether nvcc compiled the kernel or NVRTC did.
#pragma once

using i64 = long long;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace sae {

constexpr int kWarp = 32;
constexpr u32 kAllLanes = 0xffffffffu;

// CuPy compiles all code with -ftz=true; what is spelled in PTX keeps its subnormals all the same.
__device__ inline float add(float a, float b) {
#ifdef __CUDA_ARCH__
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
#else
  return a + b;
#endif
}

__device__ inline float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
#else
  return a * b;
#endif
}

// The bits of a number, of zero for -0. A compiler that may flush takes `bits | sign` for -|x| and
// flushes that too, unless it does not know that the bits are a float's.
__device__ inline u32 bits_of(float x) {
#ifdef __CUDA_ARCH__
  u32 bits;
  asm("{ .reg .f32 sum; add.rn.f32 sum, %1, 0f00000000; mov.b32 %0, sum; }" : "=r"(bits) : "f"(x));
  return bits;
#else
  return __float_as_uint(x + 0.0f);
#endif
}

__device__ inline int exclusive_sum_of_lanes(int value, int lane) {
  int sum = value;
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, apart);
    if (lane >= apart) sum += below;
  }
  return sum - value;
}

}  // namespace sae
