// Remembers which objects an optimizer's param groups and state hold.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
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
  bool unchanged(const py::list& param_groups, const py::dict& state);

  // See collected().
  template <class Visit>
  int traverse(Visit visit) const {
    for (const auto* objects : {&listed_, &held_})
      for (const py::object& object : *objects)
        if (const int stop = visit(object.ptr())) return stop;
    for (const Compared& compared : dicts_)
      if (const int stop = visit(compared.dict.ptr())) return stop;
    return 0;
  }

 private:
  // A dict as it was when its objects were compared.
  struct Compared {
    py::object dict;
    uint64_t version;
  };

  bool untouched(const py::dict& state) const;
  void remember_versions(const py::dict& state);

  // owned, so that no address is used again
  std::vector<py::object> listed_;  // by the groups: lists of parameters, and their items
  std::vector<py::object> held_;    // by the state and its entries: keys and values
  std::vector<Compared> dicts_;     // the state and its entries
};

}  // namespace fused_ema
