#include "slots.h"

#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace fused_ema {

namespace {

// Whether both tensors put their elements in the same places; the strides of dimensions of size one
// do not matter.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a_strides[d] != b_strides[d]) return false;
  return true;
}

const at::Tensor& unpack(const py::object& tensor) { return THPVariable_Unpack(tensor.ptr()); }

const c10::TensorImpl& impl(const py::object& tensor) {
  return *unpack(tensor).unsafeGetTensorImpl();
}

inline void ask_for(const void* address) { __builtin_prefetch(address); }

// What is read of a tensor lies at both of its ends.
inline void ask_for_tensor(const c10::TensorImpl& tensor) {
  ask_for(&tensor.unsafe_storage());
  ask_for(reinterpret_cast<const char*>(&tensor + 1) - 1);
}

// Out of line, so that the checks themselves stay small.
[[noreturn, gnu::cold, gnu::noinline]] void refuse_storage(const c10::TensorImpl& tensor) {
  throw std::runtime_error(c10::str("a tensor of shape ", tensor.sizes(),
                                    " has a storage that is too small for it: received ",
                                    tensor.unsafe_storage().nbytes(), " bytes"));
}

// data_ptr() without the checks that a plain dense tensor passes by construction: it is the host's
// largest cost where there are many small tensors. Copy-on-write storage is still made writable.
inline void* address(const c10::TensorImpl& tensor, int64_t itemsize) {
  const c10::Storage& storage = tensor.unsafe_storage();
  const int64_t first = tensor.storage_offset(), count = tensor.numel();
  if (static_cast<int64_t>(storage.nbytes()) < (first + count) * itemsize && count > 0)
    refuse_storage(tensor);
  return static_cast<char*>(storage.mutable_data()) + first * itemsize;
}

// Sets a word and tells whether it was another one.
inline bool put(int64_t& word, int64_t value) { return std::exchange(word, value) != value; }

inline bool put(int64_t& word, const void* pointer) {
  return put(word, reinterpret_cast<int64_t>(pointer));
}

inline bool equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  bool equal = a.size() == b.size();
  for (size_t d = 0; equal && d < a.size(); ++d) equal = a[d] == b[d];
  return equal;
}

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

bool is_rounded(at::ScalarType state, at::ScalarType weight) {
  if (state == weight) return false;
  if (state == at::kBFloat16 && weight == at::kFloat) return true;
  throw std::invalid_argument(std::string("no kernel for states of dtype ") + at::toString(state) +
                              " beside weights of " + at::toString(weight));
}

EmaFormat ema_format(at::ScalarType average, at::ScalarType arithmetic) {
  if (average == arithmetic) return EmaFormat::full;
  if (average == at::kBFloat16 && arithmetic == at::kFloat) return EmaFormat::bf16;
  if (average == at::kHalf && arithmetic == at::kFloat) return EmaFormat::delta;
  throw std::invalid_argument(std::string("no kernel for averages of dtype ") +
                              at::toString(average) + " in arithmetic of " +
                              at::toString(arithmetic));
}

// Tells autograd about a write behind its back, as torch's own in-place operations do.
void bump_version(const py::object& object) {
  const at::Tensor& tensor = unpack(object);
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

Slots::Slots(int num_scalars, bool frozen, bool takes_grads, bool capturable, bool master,
             bool teacher, std::vector<py::object> params, std::vector<py::object> steps,
             std::vector<std::vector<py::object>> states, std::vector<std::vector<py::object>> emas,
             std::vector<int> groups, const std::vector<int64_t>& places)
    : num_scalars_(num_scalars),
      frozen_(frozen),
      takes_grads_(takes_grads),
      capturable_(capturable),
      master_(master),
      teacher_(teacher),
      stored_(unpack(params.at(0)).scalar_type()),
      device_(unpack(params.at(0)).device()),
      num_states_(static_cast<int>(states.at(0).size())),
      num_emas_(static_cast<int>(emas.at(0).size()) - teacher),
      kinds_{stored_, Kind(at::kDouble)},
      groups_(std::move(groups)) {
  const at::ScalarType average = at::toOpMathType(stored_.dtype);
  for (const auto* held : {&states[0], &emas[0]})
    for (const py::object& tensor : *held) kinds_.emplace_back(unpack(tensor).scalar_type());
  const at::ScalarType weight = master ? kinds_[2].dtype : stored_.dtype;
  storage_ = {stored_type(stored_.dtype), master,
              num_states() > 0 && is_rounded(kinds_[1 + num_states_].dtype, weight),
              num_emas_ > 0 ? ema_format(kinds_[2 + num_states_].dtype, average) : EmaFormat::full};
  if (teacher_ && (storage_.ema_format != EmaFormat::delta || kinds_.back().dtype != at::kBFloat16))
    throw std::invalid_argument("no kernel for a teacher but in bfloat16, beside differences");
  rounds_ = storage_.rounds();
  offsets_.push_back(0);
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = unpack(params[i]);
    offsets_.push_back(offsets_.back() + param.numel());
    shapes_.push_back(
        {param.key_set(), param.numel(), param.is_contiguous(), param.dim(), strides_.size()});
    strides_.insert(strides_.end(), param.strides().begin(), param.strides().end());
    tensors_.push_back(std::move(params[i]));
    tensors_.push_back(std::move(steps.at(i)));
    for (py::object& state : states.at(i)) tensors_.push_back(std::move(state));
    for (py::object& average : emas.at(i)) tensors_.push_back(std::move(average));
  }
  slots_.resize(size() * slot_size());
  for (size_t i = 0; i < size(); ++i) {
    slots_[i * slot_size()] = shapes_[i].numel;
    slots_[i * slot_size() + 1] = places.at(i);
  }
  grads_.resize(size());
  row_of_.resize(size());
  counters_.resize(size());
}

bool Slots::prepare(const py::object& fold) {
  const auto kappas = fold.attr("kappas").cast<std::vector<double>>();
  rows_.clear();
  copies_.clear();
  for (size_t i = 0; i < size(); ++i) {
    fetch(i);
    const at::Tensor& param = unpack(tensors(i)[0]);
    const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
    const bool active = takes_grads_ && grad.defined();
    if (!read_pointers(i) || (active && frozen_)) return false;
    Row row{groups_[i], active, 0.0, 0.0};
    if (active && !capturable_) {
      row.before = *counters_[i];
      row.step = row.before + kappas[groups_[i]];
    }
    new_rows_ |= put(grads_[i], active ? grad_pointer(grad, param) : nullptr);
    new_rows_ |= put(row_of_[i], find_row(row));
  }
  if (!capturable_) fold_rows(fold);
  return true;
}

// Asks for the memory that the next slots are read from, a link of each chain at a time: objects,
// their tensors, the tensors' storages. With many tensors, waiting for it is most of the work.
inline void Slots::fetch(size_t i) const {
  const size_t count = num_tensors(), end = tensors_.size();
  const auto end_of = [=](size_t slot) { return std::min(end, (slot + 1) * count); };
  for (size_t k = (i + 4) * count; k < end_of(i + 4); ++k) ask_for(&unpack(tensors_[k]));
  for (size_t k = (i + 2) * count; k < end_of(i + 2); ++k) ask_for_tensor(impl(tensors_[k]));
  for (size_t k = (i + 1) * count; k < end_of(i + 1); ++k)
    ask_for(impl(tensors_[k]).unsafe_storage().unsafeGetStorageImpl());
  if (i + 1 < size()) ask_for_tensor(*impl(tensors(i + 1)[0]).grad().unsafeGetTensorImpl());
}

// False where a tensor no longer lies as it did when the slots were made.
inline bool Slots::read_pointers(size_t i) {
  const py::object* tensor = tensors(i);
  const Shape& shape = shapes_[i];
  int64_t* words = &slots_[i * slot_size()];
  const c10::TensorImpl& param = impl(tensor[0]);
  if (!as_planned(param, stored_, shape) || param.dim() != shape.dim) return false;
  new_slots_ |= put(words[2], address(param, stored_.itemsize));
  double* counter = read_counter(impl(tensor[1]));
  // the device counts where the counter was when the slots were made
  if (counter == nullptr || (capturable_ && counters_[i] != nullptr && counters_[i] != counter))
    return false;
  counters_[i] = counter;
  for (size_t k = 2; k < num_tensors(); ++k) {
    const c10::TensorImpl& held = impl(tensor[k]);
    if (!as_planned(held, kinds_[k], shape)) return false;
    new_slots_ |= put(words[1 + k], address(held, kinds_[k].itemsize));
  }
  return true;
}

// Where steps are counted, null where they cannot be.
inline double* Slots::read_counter(const c10::TensorImpl& step) const {
  if (!step.dtype().isScalarType(at::kDouble) || step.numel() != 1) return nullptr;
  if (capturable_ ? step.device() != device_ : !step.is_cpu()) return nullptr;
  return static_cast<double*>(address(step, sizeof(double)));
}

inline bool Slots::as_planned(const c10::TensorImpl& tensor, const Kind& kind,
                              const Shape& shape) const {
  return tensor.key_set() == shape.keys && tensor.dtype().isScalarType(kind.dtype) &&
         tensor.numel() == shape.numel && (device_.is_cpu() || tensor.device() == device_) &&
         tensor.is_contiguous() == shape.contiguous &&
         (shape.contiguous || same_strides(tensor, shape));
}

// Strides of dimensions of size one do not matter.
bool Slots::same_strides(const c10::TensorImpl& tensor, const Shape& shape) const {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  bool equal = tensor.dim() == shape.dim;
  for (size_t d = 0; equal && d < sizes.size(); ++d)
    equal = sizes[d] == 1 || strides[d] == strides_[shape.strides + d];
  return equal;
}

inline int64_t Slots::find_row(const Row& row) {
  // the parameters of a group nearly always share a count, so the newest row is the likely one
  for (size_t r = capturable_ ? 0 : rows_.size(); r-- > 0;)
    if (rows_[r].group == row.group && rows_[r].active == row.active &&
        rows_[r].before == row.before)
      return static_cast<int64_t>(r);
  rows_.push_back(row);
  return static_cast<int64_t>(rows_.size()) - 1;
}

void Slots::fold_rows(const py::object& fold) {
  std::vector<double> table(rows_.size() * row_size(), 0.0);
  double* out = table.data();
  for (const Row& row : rows_) {
    const py::object step = row.active ? py::object(py::float_(row.step)) : py::object(py::none());
    const py::tuple folded = fold(row.group, step);
    const py::tuple scalars = folded[0], weights = folded[1];
    if (py::ssize_t(scalars.size()) != (row.active ? num_scalars_ : 0) ||
        py::ssize_t(weights.size()) != num_emas_)
      throw std::runtime_error("a rule folds " + std::to_string(scalars.size()) +
                               " scalars, its kernel takes " + std::to_string(num_scalars_));
    for (size_t k = 0; k < scalars.size(); ++k) out[k] = scalars[k].cast<double>();
    for (int k = 0; k < num_emas_; ++k) out[num_scalars_ + k] = weights[k].cast<double>();
    if (rounds_) out[num_scalars_ + num_emas_] = fold.attr("seed")(row.group).cast<double>();
    out += row_size();
  }
  new_slots_ |= table.size() != table_.size();  // what follows the table has moved
  new_table_ |= table != table_;
  table_ = std::move(table);
}

inline void* Slots::grad_pointer(const at::Tensor& grad, const at::Tensor& param) {
  const c10::TensorImpl& found = *grad.unsafeGetTensorImpl();
  const c10::TensorImpl& like = *param.unsafeGetTensorImpl();
  // equal dispatch keys: same kind of device and layout, no lazy negation, no subclass
  if (found.key_set() == like.key_set() && found.dtype().isScalarType(stored_.dtype) &&
      found.numel() == like.numel() && equal(found.strides(), like.strides()) &&
      (device_.is_cpu() || found.device() == device_))
    return address(found, stored_.itemsize);
  return copy_grad(grad, param);
}

// A gradient that lies otherwise than its parameter, laid out like it.
void* Slots::copy_grad(const at::Tensor& grad, const at::Tensor& param) {
  if (grad.layout() != at::kStrided || grad.scalar_type() != stored_.dtype ||
      grad.device() != param.device() || grad.sizes() != param.sizes())
    refuse_grad(grad, param);
  if (same_order(grad, param) && !grad.is_neg())
    return address(*grad.unsafeGetTensorImpl(), stored_.itemsize);
  const at::NoGradGuard no_grad;
  copies_.push_back(at::empty_strided(param.sizes(), param.strides(), param.options()).copy_(grad));
  return copies_.back().data_ptr();
}

std::vector<bool> Slots::active() const {
  std::vector<bool> flags;
  for (const int64_t row : row_of_) flags.push_back(rows_[row].active);
  return flags;
}

void Slots::advance() {
  for (size_t i = 0; i < size(); ++i) {
    const py::object* tensor = tensors(i);
    const Row& row = rows_[row_of_[i]];
    if (row.active) {
      if (!capturable_) *counters_[i] = row.step;
      bump_version(tensor[0]);
    }
    for (size_t k = 2 + num_states_; k < num_tensors(); ++k) bump_version(tensor[k]);
  }
  copies_.clear();
}

void Slots::uncount() {
  for (size_t i = 0; i < size() && !capturable_; ++i) {
    const Row& row = rows_[row_of_[i]];
    double* counter = row.active ? read_counter(impl(tensors(i)[1])) : nullptr;
    if (counter != nullptr && *counter == row.step) *counter = row.before;
  }
}

int64_t Slots::num_words() const {
  return static_cast<int64_t>(table_.size() + row_of_.size() + grads_.size() + slots_.size());
}

int64_t Slots::num_changed() const {
  if (new_slots_) return num_words();
  if (new_rows_) return num_changing();
  return new_table_ ? static_cast<int64_t>(table_.size()) : 0;
}

void Slots::pack(int64_t* words, int64_t count) {
  const auto append = [&](const auto& values) {
    static_assert(sizeof values[0] == sizeof *words);
    const int64_t taken = std::min(count, static_cast<int64_t>(values.size()));
    if (taken > 0) std::memcpy(words, values.data(), taken * sizeof *words);
    words += taken;
    count -= taken;
  };
  append(table_);
  append(row_of_);
  append(grads_);
  append(slots_);
  new_table_ = new_rows_ = new_slots_ = false;
}

at::Tensor Slots::chunks(int64_t elements) const {
  std::vector<int32_t> table;
  for (size_t i = 0; i < size(); ++i)
    for (int64_t k = 0; k * elements < offsets_[i + 1] - offsets_[i]; ++k) {
      table.push_back(static_cast<int32_t>(i));
      table.push_back(static_cast<int32_t>(k));
    }
  const auto count = static_cast<int64_t>(table.size());
  at::Tensor result = at::empty({count / 2, 2}, at::kInt);
  if (count > 0) std::memcpy(result.data_ptr(), table.data(), count * sizeof(int32_t));
  return result;
}

std::vector<c10::Storage> Slots::storages() const {
  std::vector<c10::Storage> held;
  for (size_t i = 0; i < size(); ++i) {
    for (size_t k = 0; k < num_tensors(); ++k) held.push_back(unpack(tensors(i)[k]).storage());
    const at::Tensor& grad = unpack(tensors(i)[0]).unsafeGetTensorImpl()->grad();
    if (takes_grads_ && grad.defined()) held.push_back(grad.storage());
  }
  return held;
}

bool is_plain(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set();
  return !keys.has(c10::DispatchKey::Python) && tensor.has_storage() && !tensor.is_neg() &&
         !tensor.is_conj() && !tensor.is_inference();
}

}  // namespace fused_ema
