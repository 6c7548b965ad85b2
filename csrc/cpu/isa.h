// Which ISA variants this build holds, which of them this machine runs, and their kernels.
#pragma once

#include <string>
#include <vector>

#include "sae_kernels/types.h"

namespace sae {

struct Isa {
  const char* name;
  bool supported;  // by this machine
  const KernelTable* kernels;
};

// From the fastest to "portable", which is always there and always supported.
const std::vector<Isa>& isas();

// Throws std::invalid_argument for a name that is not built or not supported here.
const KernelTable& kernels(const std::string& name);

}  // namespace sae
