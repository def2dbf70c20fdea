// Remembers which tensors an optimizer holds and how they lie in memory.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace fused_ema {

namespace py = pybind11;

// Users replace things: entries of param_groups and of the state, a parameter's `.data`. Walking
// the same Python objects in the same order and comparing identities, then each tensor's layout,
// finds every such change without hashing a parameter.
class Watch {
 public:
  Watch(const py::list& param_groups, const py::dict& state);

  // Whether the same tensors are there with the same dtype, device, sizes and strides.
  bool unchanged(const py::list& param_groups, const py::dict& state) const;

 private:
  // One object met on the walk; a tensor's layout counts where it is first met.
  struct Object {
    py::object held;  // owned, so that no address is used again
    bool is_tensor;
  };
  struct Layout {
    at::ScalarType dtype;
    at::Device device;
    size_t dim;
  };

  void remember(PyObject* object, bool has_layout);
  bool same_layout(const at::Tensor& tensor, const Layout& layout, const int64_t* extents) const;

  std::vector<Object> objects_;
  std::vector<Layout> layouts_;   // one a tensor
  std::vector<int64_t> extents_;  // sizes and strides of all tensors, in turn
};

}  // namespace fused_ema
