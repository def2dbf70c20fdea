// Brings words to a GPU, so that captured graphs can repeat it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace fused_ema::cuda {

class Uploads {
 public:
  explicit Uploads(c10::Device device) : device_(device) {}

  // A new tensor each time: what an earlier launch reads is not written, and a captured graph's
  // stays.
  //   spare: outside a capture, for how many words pinned memory is made ready, because a capture
  //          must not allocate any; 0: none
  at::Tensor upload(const int64_t* words, int64_t count, bool capturing, int64_t spare);

  // Keeps what a graph reads.
  void keep(const at::Tensor& tensor) { kept_.push_back(tensor); }

  // Whether a graph reads or copies from what is kept here.
  bool captured() const { return !kept_.empty(); }

 private:
  at::Tensor pinned(int64_t count) const;

  c10::Device device_;
  at::Tensor spare_;
  std::vector<at::Tensor> kept_;
};

}  // namespace fused_ema::cuda
