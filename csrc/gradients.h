// Remembers gradients, to tell whether others have come in their place.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <vector>

namespace fused_ema {

namespace py = pybind11;

// The gradients that parameters had when this was made, and that autograd knew of no later write to
// them. They are not kept alive, and no other tensor can take the address of one.
class Gradients {
 public:
  explicit Gradients(const py::list& params);

  // Whether the parameters have the same ones, with the same values, as far as autograd knows.
  bool unchanged(const py::list& params) const;

 private:
  struct Seen {
    c10::weak_intrusive_ptr<c10::TensorImpl> grad;
    const void* memory;
    uint32_t version;
  };

  std::vector<Seen> seen_;
};

}  // namespace fused_ema
