// The kernels that round to nearest alone, and what is asked of all of them.
#include "cuda/launch.cuh"

namespace fused_ema::cuda {

int version() { return CUDART_VERSION; }

std::vector<int> architectures() { return {__CUDA_ARCH_LIST__}; }

bool fits(int64_t num_words) { return num_words <= Parameters<large>::capacity; }

KernelInfo find_kernel(const RuleId& rule, Storage storage) {
  if (storage.rounds()) return find_rounding_kernel(rule, storage);
  return find_kernel_that<false>(rule, storage);
}

}  // namespace fused_ema::cuda
