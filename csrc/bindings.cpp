#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>

#include "collected.h"
#include "cpu/plan.h"
#include "gradients.h"
#include "rules.h"
#include "slots.h"
#include "swap.h"
#include "watch.h"

#ifdef FUSED_EMA_CUDA
#include "cuda/plan.h"
#endif

namespace fused_ema {

namespace {

using Objects = std::vector<py::object>;
using ObjectLists = std::vector<Objects>;

// Fills a one-dimensional int64 tensor of the CPU, pinned or not.
void pack(Slots& slots, const at::Tensor& words) {
  if (words.scalar_type() != at::kLong || !words.is_cpu() || !words.is_contiguous())
    throw std::invalid_argument("words: received " + words.toString() +
                                ", allowed contiguous int64 words on the CPU");
  slots.pack(words.data_ptr<int64_t>(), words.numel());
}

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

void define_cuda(py::module_& module) {
#ifdef FUSED_EMA_CUDA
  using py::arg;
  py::class_<cuda::Plan>(module, "CudaPlan", collected<cuda::Plan>())
      .def(py::init<std::string, std::string, py::object, bool>(), arg("rule"), arg("variant"),
           arg("slots"), arg("ema_before"))
      .def("prepare", &cuda::Plan::prepare)
      .def("release", &cuda::Plan::release)
      .def("norm", &cuda::Plan::norm, arg("partial_sums"), arg("ending"))
      .def_property_readonly("num_sums", &cuda::Plan::num_sums)
      .def("run", &cuda::Plan::run, arg("control") = py::none(), arg("groups") = py::none())
      .def_property_readonly("captured", &cuda::Plan::captured)
      .def_property_readonly("skipping", &cuda::Plan::slots);
  module.attr("HAS_CUDA") = true;
  module.attr("CUDA_VERSION") = cuda::version();
  module.attr("CUDA_ARCHITECTURES") = cuda::architectures();
#else
  module.attr("HAS_CUDA") = false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  using py::arg;
  module.attr("TORCH_VERSION") = TORCH_VERSION;
  py::class_<Slots>(module, "Slots", collected<Slots>())
      .def(py::init<int, bool, bool, bool, bool, Objects, Objects, ObjectLists, ObjectLists,
                    std::vector<int>, std::vector<int64_t>>(),
           arg("num_scalars"), arg("frozen"), arg("takes_grads"), arg("capturable"), arg("master"),
           arg("params"), arg("steps"), arg("states"), arg("emas"), arg("groups"),
           arg("param_indices"))
      .def("prepare", &Slots::prepare)
      .def("begin", &Slots::begin)
      .def("begin_gradients", &Slots::begin_gradients)
      .def("hold", [](py::object slots) { return std::make_unique<Slots::Hold>(std::move(slots)); })
      .def("advance", &Slots::advance)
      .def("release", &Slots::release)
      .def("uncount", &Slots::uncount)
      .def_property_readonly("num_words", &Slots::num_words)
      .def_property_readonly("num_changed", &Slots::num_changed)
      .def_property_readonly("num_rows", &Slots::num_rows)
      .def_property_readonly("word_layout",
                             [](const Slots& slots) {
                               const WordLayout layout = slots.layout();
                               return std::tuple(layout.indices(), layout.grads(), layout.slots());
                             })
      .def_property_readonly("slot_layout",
                             [](const Slots& slots) {
                               const SlotLayout layout = slots.slot_layout();
                               return std::tuple(SlotLayout::numel, SlotLayout::param_index,
                                                 SlotLayout::param, layout.weight(),
                                                 layout.first_state(), layout.first_average(),
                                                 layout.size());
                             })
      .def_property_readonly("num_slots", &Slots::size)
      .def_property_readonly("counters", &Slots::counters)
      .def("pack", &pack)
      .def("chunks", &Slots::chunks);
  py::class_<Slots::Hold>(module, "Hold")
      .def("__enter__", [](py::object hold) { return hold; })
      .def("__exit__", [](Slots::Hold& hold, const py::args&) { hold.release(); });
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
  define_cuda(module);
  module.def("is_plain", &is_plain);
  module.def("spans", &spans);
  module.def("cpu_targets", &cpu::targets);
  module.def("rule_scalars", [] { return scalar_names(AllRules{}); });
  module.def("rule_variants", [] { return variants(AllRules{}); });
  module.def("rule_numbers", [] { return number_names(AllRules{}); });
  module.def("rule_flags", [] { return flag_names(AllRules{}); });
}

}  // namespace fused_ema
