#include "memory.h"

#include <c10/core/impl/COW.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fused_ema {

namespace {

const void* first(py::handle tensor) {
  const c10::TensorImpl& impl = *THPVariable_Unpack(tensor.ptr()).unsafeGetTensorImpl();
  const c10::Storage& storage = impl.unsafe_storage();
  if (!storage) return nullptr;
  const auto itemsize = static_cast<int64_t>(impl.dtype().itemsize());
  return static_cast<const char*>(storage.data()) + impl.storage_offset() * itemsize;
}

std::pair<uintptr_t, uintptr_t> span(const at::Tensor& tensor) {
  if (!tensor.has_storage() || tensor.layout() != at::kStrided || tensor.numel() == 0)
    return {0, 0};
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  const c10::Storage& storage = impl.unsafe_storage();
  const void* const data = storage.data();
  if (data == nullptr || c10::impl::cow::is_cow_data_ptr(storage.data_ptr())) return {0, 0};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto itemsize = static_cast<int64_t>(tensor.itemsize());
  const auto begin = reinterpret_cast<uintptr_t>(data) + impl.storage_offset() * itemsize;
  return {begin, begin + (last + 1) * itemsize};
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  return has_plain_keys(tensor) && tensor.has_storage() && !tensor.is_inference();
}

Addresses::Addresses(const py::list& tensors) {
  for (const py::handle tensor : tensors) first_.push_back(first(tensor));
}

bool Addresses::unchanged(const py::list& tensors) const {
  const auto count = static_cast<Py_ssize_t>(first_.size());
  bool same = PyList_GET_SIZE(tensors.ptr()) == count;
  for (Py_ssize_t i = 0; same && i < count; ++i)
    same = first_[i] == first(PyList_GET_ITEM(tensors.ptr(), i));
  return same;
}

std::vector<std::pair<uintptr_t, uintptr_t>> spans(const std::vector<at::Tensor>& tensors) {
  std::vector<std::pair<uintptr_t, uintptr_t>> found;
  found.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) found.push_back(span(tensor));
  return found;
}

}  // namespace fused_ema
