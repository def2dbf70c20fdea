// The kernels that round averages or states by random bits.
#include "cuda/launch.cuh"

namespace fused_ema::cuda {

KernelInfo find_rounding_kernel(const RuleId& rule, Storage storage) {
  return find_kernel_that<true>(rule, storage);
}

}  // namespace fused_ema::cuda
