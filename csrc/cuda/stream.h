// The stream that a launch goes to, as torch sees it; apart, so that a plan needs no GPU to
// compile.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_ema::cuda {

struct Stream {
  void* handle;    // a cudaStream_t
  bool capturing;  // what is launched becomes part of a CUDA graph
};

// torch's current stream of a device, which must be the current one.
Stream current_stream(c10::Device device);

// Tells torch's allocator that the current stream of its device reads a tensor's memory. Once
// freed, it is used anew only behind what has been given to that stream by then.
void record_reader(const at::Tensor& tensor);

}  // namespace fused_ema::cuda
