#include "cuda/uploads.h"

#include <ATen/ops/empty.h>

#include <cstring>
#include <utility>

namespace fused_ema::cuda {

at::Tensor Uploads::upload(const int64_t* words, int64_t count, bool capturing, int64_t spare) {
  const bool spared = capturing && spare_.defined() && spare_.numel() >= count;
  const at::Tensor host = spared ? std::exchange(spare_, {}) : pinned(count);
  std::memcpy(host.mutable_data_ptr(), words, count * sizeof *words);
  at::Tensor device = at::empty({count}, at::TensorOptions(at::kLong).device(device_));
  device.copy_(host.narrow(0, 0, count), /*non_blocking=*/true);
  if (capturing) {
    kept_.insert(kept_.end(), {host, device});
  } else if (spare > 0 && !spare_.defined()) {
    spare_ = pinned(spare);
  }
  return device;
}

at::Tensor Uploads::pinned(int64_t count) const {
  const auto options = at::TensorOptions(at::kLong).device(at::kCPU);
  return at::empty({count}, options.pinned_memory(!device_.is_cpu()));
}

}  // namespace fused_ema::cuda
