#include "cuda/stream.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

namespace fused_ema::cuda {

Stream current_stream(c10::Device device) {
  const auto status = c10::cuda::currentStreamCaptureStatusMayInitCtx();
  return {c10::cuda::getCurrentCUDAStream(device.index()).stream(),
          status != c10::cuda::CaptureStatus::None};
}

void record_reader(const at::Tensor& tensor) {
  tensor.record_stream(c10::cuda::getCurrentCUDAStream(tensor.device().index()).unwrap());
}

}  // namespace fused_ema::cuda
