// decode (plain and fused with residual, loss and code gradients) and code_grad on the host.
#include "sae_kernels/decode.h"

#include "tables.h"

namespace sae::SAE_ISA {

bool decode(const DecodeArgs& args) {
  switch (args.dtype) {
    case DType::f64:
      return Decode<double>{args}.run();
    case DType::bf16:
      return Decode<bf16>{args}.run();
    case DType::f16:
      return Decode<f16>{args}.run();
    default:
      return Decode<float>{args}.run();
  }
}

bool code_grad(const CodeGradArgs& args) {
  switch (args.dtype) {
    case DType::f64:
      return code_grad<double>(args);
    case DType::bf16:
      return code_grad<bf16>(args);
    case DType::f16:
      return code_grad<f16>(args);
    default:
      return code_grad<float>(args);
  }
}

}  // namespace sae::SAE_ISA
