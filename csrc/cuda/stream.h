// The stream that a launch goes to, as torch sees it; apart, so that a plan needs no GPU to
// compile.
#pragma once

#include <c10/core/Device.h>

namespace fused_ema::cuda {

struct Stream {
  void* handle;    // a cudaStream_t
  bool capturing;  // what is launched becomes part of a CUDA graph
};

// torch's current stream of a device, which must be the current one.
Stream current_stream(c10::Device device);

}  // namespace fused_ema::cuda
