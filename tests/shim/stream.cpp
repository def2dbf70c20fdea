// In place of torch's streams: everything happens at once, or is put down for a replay. A test
// says which stream is the current one, and sees which memory the allocator is told of.
#include "cuda/stream.h"

#include <vector>

#include "cuda_runtime.h"

namespace fused_ema::cuda {

namespace {

void* current = nullptr;
std::vector<const void*> recorded;

}  // namespace

Stream current_stream(c10::Device) { return {current, shim::capturing}; }

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

// Where the launches of a capture begin among all that were captured, and where they end.
FUSED_EMA_FOR_TESTS int shim_begin_capture() {
  shim::capturing = true;
  return static_cast<int>(shim::captured.size());
}

FUSED_EMA_FOR_TESTS int shim_end_capture() {
  shim::capturing = false;
  return static_cast<int>(shim::captured.size());
}

FUSED_EMA_FOR_TESTS void shim_replay(int k) { shim::captured[k](); }

FUSED_EMA_FOR_TESTS int shim_num_launches() { return static_cast<int>(shim::launches.size()); }

// The first bytes of the parameters of launch k.
FUSED_EMA_FOR_TESTS const char* shim_parameters(int k) { return shim::parameters[k].data(); }
