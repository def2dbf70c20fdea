#include "watch.h"

#include <algorithm>
#include <utility>

namespace fused_ema {

namespace {

#if PY_VERSION_HEX < 0x030E0000
constexpr bool has_versions = true;

// Differs from that of every other dict, and changes whenever something is put into this one or
// taken out (PEP 509). Python 3.12 deprecates the field, 3.14 has no such number any more.
uint64_t version(PyObject* dict) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
}
#else
constexpr bool has_versions = false;

uint64_t version(PyObject*) { return 0; }
#endif

// Calls visit for every list of parameters and its items; stops when it returns false.
template <class Visit>
bool walk_groups(const py::list& param_groups, Visit visit) {
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups.ptr()); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups.ptr(), g), params_key);
    if (params == nullptr || !PyList_Check(params) || !visit(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i)
      if (!visit(PyList_GET_ITEM(params, i))) return false;
  }
  return true;
}

// Calls visit for every key and value of the state and of its entries, likewise.
template <class Visit>
bool walk_state(const py::dict& state, Visit visit) {
  PyObject *param, *entry, *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &param, &entry);) {
    if (!visit(param) || !visit(entry)) return false;
    if (!PyDict_Check(entry)) continue;
    for (Py_ssize_t in = 0; PyDict_Next(entry, &in, &key, &value);)
      if (!visit(key) || !visit(value)) return false;
  }
  return true;
}

// Whether a walk meets these objects, in this order, and no others.
template <class Walk>
bool meets(const std::vector<py::object>& objects, Walk walk) {
  auto expected = objects.begin();
  const bool same = walk(
      [&](PyObject* found) { return expected != objects.end() && (expected++)->ptr() == found; });
  return same && expected == objects.end();
}

}  // namespace

Watch::Watch(const py::list& param_groups, const py::dict& state) {
  const auto into = [](std::vector<py::object>& objects) {
    return [&objects](PyObject* object) {
      objects.push_back(py::reinterpret_borrow<py::object>(object));
      return true;
    };
  };
  walk_groups(param_groups, into(listed_));
  walk_state(state, into(held_));
  remember_versions(state);
}

bool Watch::unchanged(const py::list& param_groups, const py::dict& state) {
  if (!meets(listed_, [&](auto visit) { return walk_groups(param_groups, visit); })) return false;
  if (untouched(state)) return true;
  if (!meets(held_, [&](auto visit) { return walk_state(state, visit); })) return false;
  remember_versions(state);
  return true;
}

// Whether nobody has written to the state or its entries since they were compared, which is far
// cheaper to see than that they hold the same objects.
bool Watch::untouched(const py::dict& state) const {
  return !dicts_.empty() && dicts_[0].dict.is(state) &&
         std::all_of(dicts_.begin(), dicts_.end(), [](const Compared& compared) {
           return version(compared.dict.ptr()) == compared.version;
         });
}

void Watch::remember_versions(const py::dict& state) {
  // until the end: dropping the last reference may run the garbage collector, which reads dicts_
  const std::vector<Compared> dropped = std::exchange(dicts_, {});
  if (!has_versions) return;
  const auto remember = [this](PyObject* dict) {
    dicts_.push_back({py::reinterpret_borrow<py::object>(dict), version(dict)});
  };
  remember(state.ptr());
  PyObject *param, *entry;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &param, &entry);)
    if (PyDict_Check(entry)) remember(entry);
}

}  // namespace fused_ema
