#include "isa.h"

#include <stdexcept>

#if defined(SAE_X86_VARIANTS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sae {

#define SAE_DECLARE_TABLE(isa) \
  namespace isa {              \
  const KernelTable& table();  \
  }
SAE_DECLARE_TABLE(portable)
#if defined(SAE_X86_VARIANTS)
SAE_DECLARE_TABLE(avx2)
SAE_DECLARE_TABLE(avx512)
SAE_DECLARE_TABLE(amx)
#if defined(SAE_AMX_MODEL)
SAE_DECLARE_TABLE(amx_model)
#endif

// Linux hands out the tile registers on request, once per process.
static bool amx_allowed() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool has_bf16 = d >> 22 & 1, has_tile = d >> 24 & 1, has_int8 = d >> 25 & 1;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return has_bf16 && has_tile && has_int8 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Selection::~Selection() = default;

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> list;
#if defined(SAE_X86_VARIANTS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    list.push_back({"amx", avx512 && amx_allowed(), &amx::table()});
    list.push_back({"avx512", avx512, &avx512::table()});
    list.push_back({"avx2", avx2, &avx2::table()});
#if defined(SAE_AMX_MODEL)
    // Last but one: never chosen unless it is named.
    list.push_back({"amx_model", avx512, &amx_model::table()});
#endif
#endif
    list.push_back({"portable", true, &portable::table()});
    return list;
  }();
  return found;
}

const KernelTable& kernels(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name == isa.name && isa.supported) return *isa.kernels;
  }
  throw std::invalid_argument("no kernels for the ISA '" + name + "' in this build or machine");
}

}  // namespace sae
