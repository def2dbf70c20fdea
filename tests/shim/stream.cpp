// In place of torch's streams: everything happens at once, and nothing is captured. A test says
// which stream is the current one, and sees which memory the allocator is told of.
#include "cuda/stream.h"

#include <vector>

namespace fused_ema::cuda {

namespace {

void* current = nullptr;
std::vector<const void*> recorded;

}  // namespace

Stream current_stream(c10::Device) { return {current, false}; }

void record_reader(const at::Tensor& tensor) { recorded.push_back(tensor.const_data_ptr()); }

}  // namespace fused_ema::cuda

#define FUSED_EMA_FOR_TESTS extern "C" __attribute__((visibility("default")))

FUSED_EMA_FOR_TESTS void shim_set_stream(void* stream) { fused_ema::cuda::current = stream; }

// How much memory has been recorded since the last call.
FUSED_EMA_FOR_TESTS int shim_num_recorded() {
  const auto count = static_cast<int>(fused_ema::cuda::recorded.size());
  fused_ema::cuda::recorded.clear();
  return count;
}
