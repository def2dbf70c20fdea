#include "slots_bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "collected.h"

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

}  // namespace

void define_slots(py::module_& module) {
  using py::arg;
  py::class_<Slots>(module, "Slots", collected<Slots>(), py::module_local())
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
  py::class_<Slots::Hold>(module, "Hold", py::module_local())
      .def("__enter__", [](py::object hold) { return hold; })
      .def("__exit__", [](Slots::Hold& hold, const py::args&) { hold.release(); });
}

}  // namespace fused_ema
