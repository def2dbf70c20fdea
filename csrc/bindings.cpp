#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>

#include "collected.h"
#include "cpu/plan.h"
#include "gradients.h"
#include "memory.h"
#include "rules.h"
#include "slots_bindings.h"
#include "swap.h"
#include "watch.h"

namespace fused_ema {

namespace {

using Names = std::map<std::string, std::vector<std::string>>;

template <class Array>
std::vector<std::string> strings(const Array& names) {
  return {names.begin(), names.end()};
}

// How many states each variant of a rule keeps.
template <class... Rules>
std::map<std::string, std::map<std::string, int>> variants(RuleList<Rules...>) {
  std::map<std::string, std::map<std::string, int>> found;
  ((found[Rules::name][Rules::variant] = Rules::num_states), ...);
  return found;
}

template <class... Rules>
Names scalar_names(RuleList<Rules...>) {
  return {{Rules::name, strings(Rules::scalars)}...};
}

template <class... Rules>
Names number_names(RuleList<Rules...>) {
  return {{Rules::name, strings(Rules::numbers)}...};
}

template <class... Rules>
Names flag_names(RuleList<Rules...>) {
  return {{Rules::name, strings(Rules::flags)}...};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using py::arg;
  module.attr("TORCH_VERSION") = TORCH_VERSION;
  define_slots(module);
  py::class_<cpu::Plan> cpu_plan(module, "Plan", collected<cpu::Plan>());
  cpu_plan
      .def(py::init<std::string, std::string, py::object, bool>(), arg("rule"), arg("variant"),
           arg("slots"), arg("ema_before"))
      .def("prepare", &cpu::Plan::prepare)
      .def("release", &cpu::Plan::release)
      .def("norm", &cpu::Plan::norm, arg("partial_sums"), arg("ending"))
      .def("run", &cpu::Plan::run, arg("control") = py::none())
      .def_property_readonly("target", &cpu::Plan::target);
  cpu_plan.attr("captured") = false;
  cpu_plan.attr("num_sums") = 1;
  cpu_plan.attr("skipping") = py::none();
  py::class_<Gradients>(module, "Gradients")
      .def(py::init<const py::list&>())
      .def("unchanged", &Gradients::unchanged);
  py::class_<Watch>(module, "Watch", collected<Watch>())
      .def(py::init<const py::list&, const py::dict&>())
      .def("unchanged", &Watch::unchanged);
  define_swap(module);
  py::class_<Addresses>(module, "Addresses")
      .def(py::init<const py::list&>())
      .def("unchanged", &Addresses::unchanged);
  module.def("is_plain", &is_plain);
  module.def("spans", &spans);
  module.def("cpu_targets", &cpu::targets);
  module.def("rule_scalars", [] { return scalar_names(AllRules{}); });
  module.def("rule_variants", [] { return variants(AllRules{}); });
  module.def("rule_numbers", [] { return number_names(AllRules{}); });
  module.def("rule_flags", [] { return flag_names(AllRules{}); });
}

}  // namespace fused_ema
