// What the garbage collector is told of C++ objects that hold Python objects.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_ema {

namespace py = pybind11;

// Lets the collector see what a Held owns, by `traverse(visit)`, which calls visit for each owned
// Python object as often as it is owned. Only its Python object may own a Held: what others share
// the collector would take for theirs too, so that they own that Python object instead.
//
// There is no tp_clear. What is owned is given at construction, or is a dict, so that every cycle
// passes through a container that the collector can clear, and no method meets a cleared object.
template <class Held>
py::custom_type_setup collected() {
  return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      const auto* instance = reinterpret_cast<const py::detail::instance*>(self);
      // not while its constructor runs
      if (!instance->simple_layout || !instance->simple_holder_constructed) return 0;
      const auto* held = static_cast<const Held*>(instance->simple_value_holder[0]);
      return held->traverse([=](PyObject* object) { return object ? visit(object, arg) : 0; });
    };
  });
}

}  // namespace fused_ema
