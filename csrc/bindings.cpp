#include <pybind11/stl.h>

#include <map>

#include "plan.h"
#include "rules.h"
#include "watch.h"

namespace fused_ema {

namespace {

template <class... Rules>
std::map<std::string, std::vector<std::string>> scalar_names(RuleList<Rules...>) {
  return {{Rules::name, {Rules::scalars.begin(), Rules::scalars.end()}}...};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using py::arg;
  py::class_<Plan>(module, "Plan")
      .def(py::init<std::string, std::vector<py::object>, std::vector<py::object>,
                    std::vector<std::vector<py::object>>, std::vector<std::vector<py::object>>,
                    std::vector<int>, bool>(),
           arg("rule"), arg("params"), arg("steps"), arg("states"), arg("emas"), arg("groups"),
           arg("ema_before"))
      .def("prepare", &Plan::prepare)
      .def("run", &Plan::run)
      .def_property_readonly("target", &Plan::target);
  py::class_<Watch>(module, "Watch")
      .def(py::init<const py::list&, const py::dict&>())
      .def("unchanged", &Watch::unchanged);
  module.def("is_plain", &is_plain);
  module.def("cpu_targets", &cpu::targets);
  module.def("rule_scalars", [] { return scalar_names(AllRules{}); });
}

}  // namespace fused_ema
