// Remembers which objects an optimizer's param groups and state hold.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fused_ema {

namespace py = pybind11;

// Users replace things: entries of param_groups, of the state, of a parameter's state. Walking the
// same containers in the same order and comparing identities finds every such change without
// hashing a parameter. What may change under an object (a tensor's `.data`) is the plans' to check.
class Watch {
 public:
  Watch(const py::list& param_groups, const py::dict& state);

  // Whether the same objects are there, in the same places.
  bool unchanged(const py::list& param_groups, const py::dict& state) const;

 private:
  std::vector<py::object> objects_;  // owned, so that no address is used again
};

}  // namespace fused_ema
