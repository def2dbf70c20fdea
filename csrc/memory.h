// What is known of tensors' memory without a look at their values.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace fused_ema {

namespace py = pybind11;

// Whether a tensor is dense memory to the dispatcher and nothing besides.
inline bool has_plain_keys(const at::Tensor& tensor) {
  const c10::DispatchKeySet besides = tensor.key_set() -
                                      c10::DispatchKeySet(c10::DispatchKey::Dense) -
                                      c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) -
                                      c10::autograd_dispatch_keyset - c10::autocast_dispatch_keyset;
  return besides.highestFunctionalityKey() == c10::DispatchKey::Undefined;
}

// Whether a tensor is nothing but memory of its own, which may be written: no subclass, no lazy
// negation or conjugation, no zeros without memory.
bool is_plain(const at::Tensor& tensor);

// Where tensors lay when they were looked at.
class Addresses {
 public:
  explicit Addresses(const py::list& tensors);
  bool unchanged(const py::list& tensors) const;

 private:
  std::vector<const void*> first_;
};

// First address of each tensor's memory and the one behind its last, 0 and 0 where it has none that
// another one may share: no elements, no storage, or one that is copied when it is written to.
std::vector<std::pair<uintptr_t, uintptr_t>> spans(const std::vector<at::Tensor>& tensors);

}  // namespace fused_ema
