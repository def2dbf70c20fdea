#include "plan.h"

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>

#include "rules.h"

namespace fused_ema {

namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t grain = 32768;

StoredType stored_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return StoredType::float32;
    case at::kDouble:
      return StoredType::float64;
    case at::kBFloat16:
      return StoredType::bfloat16;
    case at::kHalf:
      return StoredType::float16;
    default:
      throw std::invalid_argument(std::string("no kernel for dtype ") + at::toString(dtype));
  }
}

// Whether both tensors put their elements in the same places; the strides of dimensions of size one
// do not matter.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a_strides[d] != b_strides[d]) return false;
  return true;
}

const at::Tensor& unpack(const py::object& tensor) { return THPVariable_Unpack(tensor.ptr()); }

// data_ptr() without the checks that a plain dense tensor passes by construction: it is the host's
// largest cost where there are many small tensors. Copy-on-write storage is still made writable.
char* address(const at::Tensor& tensor, int64_t itemsize) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  char* storage = static_cast<char*>(impl->unsafe_storage().mutable_data());
  return storage + impl->storage_offset() * itemsize;
}

// Out of line, so that the checks themselves stay small.
[[noreturn, gnu::cold, gnu::noinline]] void refuse_grad(const at::Tensor& grad,
                                                        const at::Tensor& param) {
  if (grad.layout() != at::kStrided)
    throw std::runtime_error(
        "sparse gradients are not supported (allowed: torch.strided); use sparse=False in the "
        "embedding or torch.optim.SparseAdam");
  throw std::runtime_error("grad does not match its parameter: received " + grad.toString() +
                           " of shape " + c10::str(grad.sizes()) + ", allowed " + param.toString() +
                           " of shape " + c10::str(param.sizes()));
}

// Tells autograd about a write behind its back, as torch's own in-place operations do.
void bump_version(const py::object& object) {
  const at::Tensor& tensor = unpack(object);
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

Plan::Plan(std::string rule, std::vector<py::object> params, std::vector<py::object> steps,
           std::vector<std::vector<py::object>> states, std::vector<std::vector<py::object>> emas,
           std::vector<int> groups, bool ema_before)
    : rule_(std::move(rule)),
      target_(cpu::chosen_target()),
      num_states_(static_cast<int>(states.at(0).size())),
      num_emas_(static_cast<int>(emas.at(0).size())),
      stride_(2 + num_states_ + num_emas_),
      frozen_(rule_ == Frozen::name),
      ema_before_(ema_before),
      groups_(std::move(groups)) {
  stored_ = unpack(params.at(0)).scalar_type();
  average_ = at::toOpMathType(stored_);
  stored_size_ = static_cast<int64_t>(c10::elementSize(stored_));
  average_size_ = static_cast<int64_t>(c10::elementSize(average_));
  kernel_ = cpu::find_kernel(target_, rule_, num_states_, stored_type(stored_));
  if (kernel_.kernel == nullptr)
    throw std::invalid_argument("no kernel for rule " + rule_ + " with " +
                                std::to_string(num_states_) + " states");
  offsets_.push_back(0);
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = unpack(params[i]);
    offsets_.push_back(offsets_.back() + param.numel());
    shapes_.push_back({param.key_set(), param.is_contiguous(), param.dim(), strides_.size()});
    strides_.insert(strides_.end(), param.strides().begin(), param.strides().end());
    tensors_.push_back(std::move(params[i]));
    tensors_.push_back(std::move(steps.at(i)));
    for (py::object& state : states.at(i)) tensors_.push_back(std::move(state));
    for (py::object& average : emas.at(i)) tensors_.push_back(std::move(average));
  }
  pointers_.resize(groups_.size() * stride_);
  counters_.resize(groups_.size());
  row_of_.resize(groups_.size());
}

bool Plan::prepare(const py::object& fold) {
  const auto kappas = fold.attr("kappas").cast<std::vector<double>>();
  rows_.clear();
  copies_.clear();
  for (size_t i = 0; i < groups_.size(); ++i) {
    const at::Tensor& param = unpack(tensors_[i * stride_]);
    const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
    if (!read_pointers(i, param) || (grad.defined() && frozen_)) return false;
    Row row{groups_[i], grad.defined(), 0.0};
    if (row.active) {
      row.step = *counters_[i] + kappas[groups_[i]];
      pointers_[i * stride_ + 1] = grad_pointer(grad, param);
    }
    row_of_[i] = find_row(row);
  }
  fold_rows(fold);
  return true;
}

// False where a tensor no longer lies as it did when the plan was made.
bool Plan::read_pointers(size_t i, const at::Tensor& param) {
  const py::object* tensors = &tensors_[i * stride_];
  void** pointers = &pointers_[i * stride_];
  const at::Tensor& step = unpack(tensors[1]);
  if (!as_planned(param, i, stored_) || param.dim() != shapes_[i].dim ||
      step.scalar_type() != at::kDouble || step.numel() != 1 || !step.is_cpu())
    return false;
  pointers[0] = address(param, stored_size_);
  counters_[i] = reinterpret_cast<double*>(address(step, sizeof(double)));
  int k = 2;
  for (; k < 2 + num_states_; ++k) {
    if (!as_planned(unpack(tensors[k]), i, stored_)) return false;
    pointers[k] = address(unpack(tensors[k]), stored_size_);
  }
  for (; k < stride_; ++k) {
    if (!as_planned(unpack(tensors[k]), i, average_)) return false;
    pointers[k] = address(unpack(tensors[k]), average_size_);
  }
  return true;
}

bool Plan::as_planned(const at::Tensor& tensor, size_t i, at::ScalarType dtype) const {
  const Shape& shape = shapes_[i];
  return tensor.key_set() == shape.keys && tensor.scalar_type() == dtype &&
         tensor.numel() == offsets_[i + 1] - offsets_[i] &&
         tensor.is_contiguous() == shape.contiguous &&
         (shape.contiguous || same_strides(tensor, shape));
}

// Strides of dimensions of size one do not matter.
bool Plan::same_strides(const at::Tensor& tensor, const Shape& shape) const {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  bool equal = tensor.dim() == shape.dim;
  for (size_t d = 0; equal && d < sizes.size(); ++d)
    equal = sizes[d] == 1 || strides[d] == strides_[shape.strides + d];
  return equal;
}

int Plan::find_row(const Row& row) {
  // the parameters of a group nearly always share a count, so the newest row is the likely one
  for (size_t r = rows_.size(); r-- > 0;)
    if (rows_[r].group == row.group && rows_[r].active == row.active && rows_[r].step == row.step)
      return static_cast<int>(r);
  rows_.push_back(row);
  return static_cast<int>(rows_.size()) - 1;
}

void Plan::fold_rows(const py::object& fold) {
  table_.assign(rows_.size() * row_size(), 0.0);
  double* out = table_.data();
  for (const Row& row : rows_) {
    const py::object step = row.active ? py::object(py::float_(row.step)) : py::object(py::none());
    const py::tuple folded = fold(row.group, step);
    const py::tuple scalars = folded[0], weights = folded[1];
    if (py::ssize_t(scalars.size()) != (row.active ? kernel_.num_scalars : 0) ||
        py::ssize_t(weights.size()) != num_emas_)
      throw std::runtime_error("rule " + rule_ + " folds " + std::to_string(scalars.size()) +
                               " scalars, its kernel takes " + std::to_string(kernel_.num_scalars));
    for (size_t k = 0; k < scalars.size(); ++k) out[k] = scalars[k].cast<double>();
    for (int k = 0; k < num_emas_; ++k) out[kernel_.num_scalars + k] = weights[k].cast<double>();
    out += row_size();
  }
}

void* Plan::grad_pointer(const at::Tensor& grad, const at::Tensor& param) {
  // equal dispatch keys: same kind of device and layout, no lazy negation, no subclass
  if (grad.key_set() == param.key_set() && grad.scalar_type() == stored_ &&
      grad.numel() == param.numel() && grad.strides().equals(param.strides()))
    return address(grad, stored_size_);
  if (grad.layout() != at::kStrided || grad.scalar_type() != stored_ ||
      grad.device() != param.device() || grad.sizes() != param.sizes())
    refuse_grad(grad, param);
  if (same_order(grad, param) && !grad.is_neg()) return grad.data_ptr();
  const at::NoGradGuard no_grad;
  copies_.push_back(at::empty_strided(param.sizes(), param.strides(), param.options()).copy_(grad));
  return copies_.back().data_ptr();
}

void Plan::run() {
  for (size_t i = 0; i < groups_.size(); ++i) {
    const py::object* tensors = &tensors_[i * stride_];
    if (is_active(i)) {
      *counters_[i] = rows_[row_of_[i]].step;
      bump_version(tensors[0]);
    }
    for (int k = 2 + num_states_; k < stride_; ++k) bump_version(tensors[k]);
  }
  if (offsets_.back() < grain) {
    run_elements(0, offsets_.back());
  } else {
    const std::vector<c10::Storage> held = storages();
    const py::gil_scoped_release released;
    at::parallel_for(0, offsets_.back(), grain,
                     [this](int64_t begin, int64_t end) { run_elements(begin, end); });
  }
  copies_.clear();
}

// Without the GIL another thread may replace a gradient or `.data`; what it drops must outlive
// run().
std::vector<c10::Storage> Plan::storages() const {
  std::vector<c10::Storage> held;
  for (size_t i = 0; i < groups_.size(); ++i) {
    for (int k = 0; k < stride_; ++k) held.push_back(unpack(tensors_[i * stride_ + k]).storage());
    const at::Tensor& grad = unpack(tensors_[i * stride_]).unsafeGetTensorImpl()->grad();
    if (grad.defined()) held.push_back(grad.storage());
  }
  return held;
}

// Shares out elements, not tensors: threads get equal bytes however unequal the tensors are.
void Plan::run_elements(int64_t begin, int64_t end) const {
  size_t i = std::upper_bound(offsets_.begin(), offsets_.end(), begin) - offsets_.begin() - 1;
  for (; begin < end; ++i) {
    const int64_t stop = std::min(end, offsets_[i + 1]);
    if (stop == begin) continue;
    const double* row = table_.data() + row_of_[i] * row_size();
    kernel_.kernel({&pointers_[i * stride_], begin - offsets_[i], stop - offsets_[i], row,
                    num_emas_, is_active(i), ema_before_});
    begin = stop;
  }
}

bool is_plain(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  return !keys.has(c10::DispatchKey::Python) && tensor.has_storage() && !tensor.is_neg() &&
         !tensor.is_conj() && !tensor.is_inference();
}

}  // namespace fused_ema
