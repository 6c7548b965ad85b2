// Memory whose borders are watched. Every buffer ends where a page begins that may not be touched,
// so that reading past its end is a fault even from instructions no sanitizer knows (AMX tile
// loads); before it lies a band of a known pattern, which AddressSanitizer is told to let no one
// touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "sae_kernels/types.h"

#if defined(__has_feature)
#define SAE_HAS_FEATURE(x) __has_feature(x)
#else
#define SAE_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || SAE_HAS_FEATURE(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define SAE_POISON(p, n) __asan_poison_memory_region(p, n)
#define SAE_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define SAE_POISON(p, n) (void)0
#define SAE_UNPOISON(p, n) (void)0
#endif

namespace sae::test {

inline int failures = 0;
inline const char* where = "";

inline void check(bool condition, const char* what, long long at = -1) {
  if (condition) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s: %s (at %lld)\n", where, what, at);
}

// n elements, filled with 0xff (NaN, or -1) until written. The end is aligned to `alignment` bytes,
// by default to the element only: rows may start anywhere.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, size_t alignment = sizeof(T)) : size_(n) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used =
        (static_cast<size_t>(n) * sizeof(T) + alignment - 1) / alignment * alignment;
    const size_t open = (kBand + used + page - 1) / page * page;
    bytes_ = open + page;
    void* memory =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + open, page, PROT_NONE)) {
      std::perror("mmap");
      std::exit(2);
    }
    base_ = static_cast<unsigned char*>(memory);
    band_ = open - used;
    std::memset(base_, kPattern, band_);
    std::memset(base_ + band_, 0xff, used);
    SAE_POISON(base_, band_);
  }
  ~Buffer() {
    SAE_UNPOISON(base_, band_);
    for (size_t i = 0; i < band_; ++i) {
      check(base_[i] == kPattern, "written to before the start of a buffer", band_ - i);
    }
    munmap(base_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return reinterpret_cast<T*>(base_ + band_); }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return size_; }

 private:
  static constexpr size_t kBand = 256;
  static constexpr unsigned char kPattern = 0xa5;
  int64_t size_;
  size_t bytes_, band_;
  unsigned char* base_;
};

// A small generator: the tests must not depend on a library's.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  int below(int64_t n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
  int small() { return below(7) - 3; }

 private:
  uint64_t state_;
};

// Integers up to 2048 in every operand type: exact, and so is every sum of them here.
inline void put(float& out, int v) { out = static_cast<float>(v); }
inline void put(double& out, int v) { out = v; }
inline void put(bf16& out, int v) {
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  out.bits = static_cast<uint16_t>(bits >> 16);
}
inline void put(f16& out, int v) {
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  const uint32_t half = v == 0 ? 0 : ((bits & 0x7fffffffu) - 0x38000000u) >> 13;
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}
template <class E>
constexpr DType kDType = DType::f32;
template <>
inline constexpr DType kDType<double> = DType::f64;
template <>
inline constexpr DType kDType<bf16> = DType::bf16;
template <>
inline constexpr DType kDType<f16> = DType::f16;

// Fills a buffer with small integers and returns them.
template <class E>
std::vector<int> fill(Buffer<E>& buffer, Random& random) {
  std::vector<int> values;
  for (int64_t i = 0; i < buffer.size(); ++i) {
    values.push_back(random.small());
    put(buffer[i], values.back());
  }
  return values;
}

}  // namespace sae::test
