// The extension module of the CUDA kernels, apart from the one of the CPU: a torch without CUDA
// loads that one alone.
#include <pybind11/stl.h>
#include <torch/version.h>

#include <vector>

#include "collected.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "slots_bindings.h"

namespace fused_ema {

PYBIND11_MODULE(_native_cuda, module) {
  using cuda::Plan;
  using py::arg;
  module.attr("TORCH_VERSION") = TORCH_VERSION;
  define_slots(module);
  py::class_<Plan>(module, "CudaPlan", collected<Plan>())
      .def(py::init<std::string, std::string, py::object, bool>(), arg("rule"), arg("variant"),
           arg("slots"), arg("ema_before"))
      .def("prepare", &Plan::prepare)
      .def("release", &Plan::release)
      .def("norm", &Plan::norm, arg("partial_sums"), arg("ending"))
      .def_property_readonly("num_sums", &Plan::num_sums)
      .def("run", &Plan::run, arg("control") = py::none(), arg("groups") = py::none())
      .def_property_readonly("captured", &Plan::captured)
      .def_property_readonly("skipping", &Plan::slots);
  module.attr("CUDA_VERSION") = cuda::version();
  module.attr("CUDA_ARCHITECTURES") = cuda::architectures();
  // set by the build, because no macro of nvcc's tells
  module.attr("CUDA_PTX") = std::vector<int>{FUSED_EMA_CUDA_PTX};
}

}  // namespace fused_ema
