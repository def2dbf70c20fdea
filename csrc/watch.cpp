#include "watch.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace fused_ema {

namespace {

// Calls visit(object, has_layout) for every parameter of every group, then for every key and value
// of the state; stops when visit returns false. A parameter is met twice, with a layout once.
template <class Visit>
bool walk(const py::list& param_groups, const py::dict& state, Visit visit) {
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups.ptr()); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups.ptr(), g), params_key);
    if (params == nullptr || !PyList_Check(params) || !visit(params, false)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i)
      if (!visit(PyList_GET_ITEM(params, i), true)) return false;
  }
  PyObject *param, *entry, *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &param, &entry);) {
    if (!visit(param, false) || !visit(entry, false)) return false;
    if (!PyDict_Check(entry)) continue;
    for (Py_ssize_t in = 0; PyDict_Next(entry, &in, &key, &value);)
      if (!visit(key, false) || !visit(value, false)) return false;
  }
  return true;
}

// A loop, because a call of memcmp costs more than the few numbers it compares.
bool same(at::IntArrayRef found, const int64_t* expected) {
  bool equal = true;
  for (size_t d = 0; d < found.size(); ++d) equal &= found[d] == expected[d];
  return equal;
}

}  // namespace

Watch::Watch(const py::list& param_groups, const py::dict& state) {
  walk(param_groups, state, [this](PyObject* object, bool has_layout) {
    remember(object, has_layout);
    return true;
  });
}

void Watch::remember(PyObject* object, bool has_layout) {
  // asked once: for anything but a plain tensor or parameter the check is slow
  const bool is_tensor = has_layout && THPVariable_Check(object);
  objects_.push_back({py::reinterpret_borrow<py::object>(object), is_tensor});
  if (!is_tensor) return;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  layouts_.push_back({tensor.scalar_type(), tensor.device(), sizes.size()});
  extents_.insert(extents_.end(), sizes.begin(), sizes.end());
  extents_.insert(extents_.end(), strides.begin(), strides.end());
}

bool Watch::same_layout(const at::Tensor& tensor, const Layout& layout,
                        const int64_t* extents) const {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return sizes.size() == layout.dim && tensor.scalar_type() == layout.dtype &&
         tensor.device() == layout.device && same(sizes, extents) &&
         same(strides, extents + layout.dim);
}

bool Watch::unchanged(const py::list& param_groups, const py::dict& state) const {
  auto object = objects_.begin();
  auto layout = layouts_.begin();
  const int64_t* extents = extents_.data();
  const bool held = walk(param_groups, state, [&](PyObject* found, bool) {
    if (object == objects_.end() || object->held.ptr() != found) return false;
    if (!(object++)->is_tensor) return true;
    if (!same_layout(THPVariable_Unpack(found), *layout, extents)) return false;
    extents += 2 * layout->dim;
    ++layout;
    return true;
  });
  return held && object == objects_.end();
}

}  // namespace fused_ema
