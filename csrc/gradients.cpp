#include "gradients.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fused_ema {

namespace {

const at::Tensor& grad_of(PyObject* param) {
  return THPVariable_Unpack(param).unsafeGetTensorImpl()->grad();
}

// The gradient's memory; null if it is undefined or has no storage.
const void* memory_of(const at::Tensor& grad) {
  return grad.defined() && grad.has_storage() ? grad.storage().data() : nullptr;
}

// What was made under inference_mode has no count of its writes.
bool is_counted(const at::Tensor& grad) { return grad.defined() && !grad.is_inference(); }

uint32_t version_of(const at::Tensor& grad) {
  return is_counted(grad) ? grad.unsafeGetTensorImpl()->version_counter().current_version() : 0;
}

}  // namespace

Gradients::Gradients(const py::list& params) {
  seen_.reserve(params.size());
  for (const py::handle param : params) {
    const at::Tensor& grad = grad_of(param.ptr());
    seen_.push_back({c10::weak_intrusive_ptr<c10::TensorImpl>(grad.getIntrusivePtr()),
                     memory_of(grad), version_of(grad)});
  }
}

bool Gradients::unchanged(const py::list& params) const {
  const auto count = static_cast<Py_ssize_t>(seen_.size());
  bool same = PyList_GET_SIZE(params.ptr()) == count;
  for (Py_ssize_t i = 0; same && i < count; ++i) {
    const at::Tensor& grad = grad_of(PyList_GET_ITEM(params.ptr(), i));
    const Seen& seen = seen_[i];
    same = seen.grad._unsafe_get_target() == grad.unsafeGetTensorImpl() &&
           (!grad.defined() || is_counted(grad)) && seen.memory == memory_of(grad) &&
           seen.version == version_of(grad);
  }
  return same;
}

}  // namespace fused_ema
