#include "watch.h"

namespace fused_ema {

namespace {

// Calls visit for every list of parameters and its items, then for every key and value of the state
// and of its entries; stops when visit returns false.
template <class Visit>
bool walk(const py::list& param_groups, const py::dict& state, Visit visit) {
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups.ptr()); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups.ptr(), g), params_key);
    if (params == nullptr || !PyList_Check(params) || !visit(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i)
      if (!visit(PyList_GET_ITEM(params, i))) return false;
  }
  PyObject *param, *entry, *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &param, &entry);) {
    if (!visit(param) || !visit(entry)) return false;
    if (!PyDict_Check(entry)) continue;
    for (Py_ssize_t in = 0; PyDict_Next(entry, &in, &key, &value);)
      if (!visit(key) || !visit(value)) return false;
  }
  return true;
}

}  // namespace

Watch::Watch(const py::list& param_groups, const py::dict& state) {
  walk(param_groups, state, [this](PyObject* object) {
    objects_.push_back(py::reinterpret_borrow<py::object>(object));
    return true;
  });
}

bool Watch::unchanged(const py::list& param_groups, const py::dict& state) const {
  auto expected = objects_.begin();
  const bool same = walk(param_groups, state, [&](PyObject* found) {
    return expected != objects_.end() && (expected++)->ptr() == found;
  });
  return same && expected == objects_.end();
}

}  // namespace fused_ema
