// The kernels of csrc/cuda on the host, behind the same words as a launch of theirs on a GPU.
#include "cuda_on_host.h"

namespace sae {
constexpr size_t kSharedWords = (227 << 10) / 8, kGuardWords = 64;
alignas(16) thread_local unsigned long long dynamic_shared[kSharedWords + kGuardWords];
}  // namespace sae

#include "select_tile.cu"
#include "transpose_codes.cu"

namespace {

using Words = const long long*;
constexpr unsigned long long kUntouched = 0x7ff8dead7ff8deadull;  // NaN, and no sensible index

template <class T>
T as(long long word) {
  T value;
  static_assert(sizeof(value) == sizeof(word), "a parameter is a 64-bit word");
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

template <class... Parameters, size_t... I>
std::function<void()> bound(void (*kernel)(Parameters...), Words words, size_t n,
                            std::index_sequence<I...>) {
  if (n != sizeof...(Parameters)) throw std::runtime_error("wrong number of arguments");
  return [=] { kernel(as<Parameters>(words[I])...); };
}

template <class... Parameters>
std::function<void()> bound(void (*kernel)(Parameters...), Words words, size_t n) {
  return bound(kernel, words, n, std::index_sequence_for<Parameters...>());
}

std::function<void()> find(const std::string& name, Words words, size_t n) {
#define SAE_CUDA_KERNEL(kernel) \
  if (name == #kernel) return bound(&::kernel, words, n);
#include "kernels.h"
#undef SAE_CUDA_KERNEL
  throw std::runtime_error("there is no such kernel");
}

}  // namespace

// Null, or what went wrong.
extern "C" const char* launch(const char* name, long long grid, long long block, long long shared,
                              Words words, long long n, int schedule) {
  static std::string error;
  try {
    const size_t used = static_cast<size_t>(shared + 7) / 8;
    if (used > sae::kSharedWords) throw std::runtime_error("too much shared memory");
    for (auto& word : sae::dynamic_shared) word = kUntouched;
    host::run(find(name, words, static_cast<size_t>(n)), static_cast<unsigned>(grid),
              static_cast<unsigned>(block), schedule);
    for (size_t i = used; i < used + sae::kGuardWords; ++i) {
      if (sae::dynamic_shared[i] != kUntouched)
        throw std::runtime_error("wrote past shared memory");
    }
  } catch (const std::exception& failure) {
    error = std::string(name) + ": " + failure.what();
    return error.c_str();
  }
  return nullptr;
}
