#include "slots.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "dtypes.h"
#include "memory.h"

namespace fused_ema {

namespace {

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
[[noreturn, gnu::cold, gnu::noinline]] void refuse_storage(const c10::TensorImpl& tensor,
                                                           const char* reason) {
  throw std::runtime_error(c10::str("a tensor of shape ", tensor.sizes(), reason, ": received ",
                                    tensor.unsafe_storage().nbytes(), " bytes"));
}

// data_ptr() without the checks that a plain dense tensor passes by construction: it is the host's
// largest cost where there are many small tensors. Copy-on-write storage is made writable, so that
// its memory is its own. Null only where there are no elements.
inline void* address(const c10::TensorImpl& tensor, int64_t itemsize) {
  const c10::Storage& storage = tensor.unsafe_storage();
  const int64_t first = tensor.storage_offset(), count = tensor.numel();
  if (count == 0) return nullptr;
  if (static_cast<int64_t>(storage.nbytes()) < (first + count) * itemsize)
    refuse_storage(tensor, " has a storage that is too small for it");
  void* const data = storage.mutable_data();
  if (data == nullptr) refuse_storage(tensor, " has a storage without memory");
  return static_cast<char*>(data) + first * itemsize;
}

// Whether so many elements of a tensor's are still where they were read from. Then nothing else of
// it need be looked at again: whatever it has become, that memory is its own and may be written.
inline bool lies_at(const c10::TensorImpl& tensor, int64_t itemsize, int64_t numel,
                    const void* where) {
  const c10::Storage& storage = tensor.unsafe_storage();
  const int64_t first = tensor.storage_offset() * itemsize;
  return static_cast<char*>(storage.mutable_data()) + first == where &&
         static_cast<int64_t>(storage.nbytes()) >= first + numel * itemsize;
}

inline bool lies_at(const c10::TensorImpl& tensor, int64_t itemsize, int64_t numel, int64_t word) {
  return lies_at(tensor, itemsize, numel, reinterpret_cast<const void*>(word));
}

// Sets a word and tells whether it was another one.
inline bool put(int64_t& word, int64_t value) { return std::exchange(word, value) != value; }

inline bool put(uint16_t& index, uint16_t value) { return std::exchange(index, value) != value; }

inline bool put(int64_t& word, const void* pointer) {
  return put(word, reinterpret_cast<int64_t>(pointer));
}

inline bool equal(c10::IntArrayRef a, c10::IntArrayRef b) {
  bool equal = a.size() == b.size();
  for (size_t d = 0; equal && d < a.size(); ++d) equal = a[d] == b[d];
  return equal;
}

[[noreturn, gnu::cold, gnu::noinline]] void refuse_moved() {
  throw std::runtime_error(
      "a parameter, its state or its gradient was replaced or resized while step() was under way; "
      "allowed: between steps");
}

// Whether both tensors put their elements in the same places; the strides of dimensions of size one
// do not matter.
bool same_order(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), a_strides = a.strides(), b_strides = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a_strides[d] != b_strides[d]) return false;
  return true;
}

// The word of a slot's k-th tensor beside the parameter and its step: a state or an average.
constexpr size_t word_of(size_t k) { return SlotLayout::param + k - 1; }

// Tells autograd about a write behind its back, as torch's own in-place operations do.
void bump_version(const py::object& object) {
  const at::Tensor& tensor = unpack(object);
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

Slots::Slots(int num_scalars, bool frozen, bool takes_grads, bool capturable, bool master,
             std::vector<py::object> params, std::vector<py::object> steps,
             std::vector<std::vector<py::object>> states, std::vector<std::vector<py::object>> emas,
             std::vector<int> groups, const std::vector<int64_t>& param_indices)
    : num_scalars_(num_scalars),
      frozen_(frozen),
      takes_grads_(takes_grads),
      capturable_(capturable),
      master_(master),
      stored_(unpack(params.at(0)).scalar_type()),
      device_(unpack(params.at(0)).device()),
      num_states_(static_cast<int>(states.at(0).size())),
      num_emas_(static_cast<int>(emas.at(0).size())),
      kinds_{stored_, Kind(at::kDouble)},
      groups_(std::move(groups)) {
  if (static_cast<int64_t>(params.size()) > WordLayout::most_slots)
    throw std::invalid_argument("params: received " + std::to_string(params.size()) +
                                " tensors; allowed: " + std::to_string(WordLayout::most_slots));
  const at::ScalarType average = at::toOpMathType(stored_.dtype);
  for (const auto* like : {&states[0], &emas[0]})
    for (const py::object& tensor : *like) kinds_.emplace_back(unpack(tensor).scalar_type());
  const at::ScalarType weight = master ? kinds_[2].dtype : stored_.dtype;
  storage_ = {stored_type(stored_.dtype), master,
              num_states() > 0 && is_rounded(kinds_[1 + num_states_].dtype, weight),
              num_emas_ > 0 ? ema_format(kinds_[2 + num_states_].dtype, average) : EmaFormat::full};
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
  slots_.resize(size() * slot_layout().size());
  for (size_t i = 0; i < size(); ++i) {
    slot(i)[SlotLayout::numel] = shapes_[i].numel;
    slot(i)[SlotLayout::param_index] = param_indices.at(i);
  }
  grads_.resize(size());
  row_of_.resize((layout().grads() - layout().indices()) * WordLayout::indices_per_word);
  counters_.resize(size());
}

bool Slots::prepare(const py::object& fold) {
  if (hold_lives_)
    throw std::runtime_error("step() is under way in another thread; allowed: one at a time");
  const auto advances = fold.attr("advances").cast<std::vector<double>>();
  rows_.clear();
  grads_held_.clear();
  grads_held_.resize(size());
  for (size_t i = 0; i < size(); ++i) {
    fetch(i);
    const at::Tensor& param = unpack(tensors(i)[0]);
    const at::Tensor& grad = param.unsafeGetTensorImpl()->grad();
    const bool active = takes_grads_ && grad.defined();
    if (!read_pointers(i) || (active && frozen_)) return false;
    Row row{groups_[i], active, 0.0, 0.0};
    if (active && !capturable_) {
      row.before = *counters_[i];
      row.step = row.before + advances[groups_[i]];
    }
    if (active) grads_held_[i] = fits(grad, param) ? grad : copy_grad(grad, param);
    read_gradient(i);
    new_rows_ |= put(row_of_[i], find_row(row));
  }
  if (!capturable_) fold_rows(fold);
  return true;
}

void Slots::begin() {
  for (size_t i = 0; i < size(); ++i) {
    const py::object* tensor = tensors(i);
    const int64_t* words = slot(i);
    const int64_t numel = words[SlotLayout::numel];
    bool same = lies_at(impl(tensor[0]), stored_.itemsize, numel, words[SlotLayout::param]) &&
                lies_at(impl(tensor[1]), sizeof(double), 1, counters_[i]);
    for (size_t k = 2; k < num_tensors(); ++k)
      same = same && lies_at(impl(tensor[k]), kinds_[k].itemsize, numel, words[word_of(k)]);
    if (!same && !read_pointers(i)) refuse_moved();
  }
  begin_gradients();
}

void Slots::begin_gradients() {
  if (grads_held_.size() != size())
    throw std::runtime_error("what step() has prepared was dropped by another thread's step()");
  for (size_t i = 0; i < size(); ++i) {
    const at::Tensor& grad = grads_held_[i];
    if (!grad.defined() ||
        lies_at(*grad.unsafeGetTensorImpl(), stored_.itemsize, numel(i), grads_[i]))
      continue;
    if (!fits(grad, unpack(tensors(i)[0]))) refuse_moved();
    read_gradient(i);
  }
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
  int64_t* words = slot(i);
  const c10::TensorImpl& param = impl(tensor[0]);
  if (!as_planned(param, stored_, shape) || param.dim() != shape.dim) return false;
  new_slots_ |= put(words[SlotLayout::param], address(param, stored_.itemsize));
  double* counter = read_counter(impl(tensor[1]));
  // the device counts where the counter was when the slots were made
  if (counter == nullptr || (capturable_ && counters_[i] != nullptr && counters_[i] != counter))
    return false;
  counters_[i] = counter;
  for (size_t k = 2; k < num_tensors(); ++k) {
    const c10::TensorImpl& other = impl(tensor[k]);
    if (!as_planned(other, kinds_[k], shape)) return false;
    new_slots_ |= put(words[word_of(k)], address(other, kinds_[k].itemsize));
  }
  return true;
}

inline void Slots::read_gradient(size_t i) {
  const at::Tensor& grad = grads_held_[i];
  void* const found =
      grad.defined() ? address(*grad.unsafeGetTensorImpl(), stored_.itemsize) : nullptr;
  new_rows_ |= put(grads_[i], found);
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

inline uint16_t Slots::find_row(const Row& row) {
  // the parameters of a group nearly always share a count, so the newest row is the likely one
  for (size_t r = capturable_ ? 0 : rows_.size(); r-- > 0;)
    if (rows_[r].group == row.group && rows_[r].active == row.active &&
        rows_[r].before == row.before)
      return static_cast<uint16_t>(r);
  rows_.push_back(row);
  return static_cast<uint16_t>(rows_.size() - 1);
}

void Slots::fold_rows(const py::object& fold) {
  const RowLayout layout = row_layout();
  std::vector<double> table(rows_.size() * layout.size(), 0.0);
  double* out = table.data();
  for (const Row& row : rows_) {
    const py::object step = row.active ? py::object(py::float_(row.step)) : py::object(py::none());
    const py::tuple folded = fold(row.group, step);
    const py::tuple scalars = folded[0], ema_rates = folded[1];
    if (py::ssize_t(scalars.size()) != (row.active ? num_scalars_ : 0) ||
        (num_emas_ > 0 && py::ssize_t(ema_rates.size()) != num_emas_))
      throw std::runtime_error("a rule folds " + std::to_string(scalars.size()) +
                               " scalars, its kernel takes " + std::to_string(num_scalars_));
    for (size_t k = 0; k < scalars.size(); ++k) out[k] = scalars[k].cast<double>();
    for (int k = 0; k < num_emas_; ++k)
      out[layout.first_ema_rate() + k] = ema_rates[k].cast<double>();
    if (rounds_) out[layout.seed()] = fold.attr("seed")(row.group).cast<double>();
    out += layout.size();
  }
  new_slots_ |= table.size() != table_.size();  // what follows the table has moved
  new_table_ |= table != table_;
  table_ = std::move(table);
}

// Whether kernels can read a gradient where it is.
inline bool Slots::fits(const at::Tensor& grad, const at::Tensor& param) const {
  const c10::TensorImpl& found = *grad.unsafeGetTensorImpl();
  const c10::TensorImpl& like = *param.unsafeGetTensorImpl();
  // equal dispatch keys: same kind of device and layout, no lazy negation, no subclass
  return (found.key_set() == like.key_set() && found.dtype().isScalarType(stored_.dtype) &&
          found.numel() == like.numel() && equal(found.strides(), like.strides()) &&
          (device_.is_cpu() || found.device() == device_)) ||
         fits_otherwise(grad, param);
}

bool Slots::fits_otherwise(const at::Tensor& grad, const at::Tensor& param) const {
  return has_plain_keys(grad) && grad.has_storage() && grad.scalar_type() == stored_.dtype &&
         grad.device() == device_ && grad.sizes() == param.sizes() && same_order(grad, param);
}

// A gradient that does not fit, as one that does: in memory of its own, laid out like its
// parameter.
at::Tensor Slots::copy_grad(const at::Tensor& grad, const at::Tensor& param) const {
  const py::object copied = py::module_::import("fused_ema.step.gradients").attr("copied");
  at::Tensor result = copied(grad, param).cast<at::Tensor>();
  if (!fits(result, param))
    throw std::runtime_error("a gradient's copy is not what it was made as");
  return result;
}

std::vector<int64_t> Slots::counters() const {
  std::vector<int64_t> words;
  for (size_t i = 0; i < size(); ++i) words.push_back(counter(i));
  return words;
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
  release();
}

void Slots::uncount() {
  for (size_t i = 0; i < size() && !capturable_; ++i) {
    const Row& row = rows_[row_of_[i]];
    double* counter = row.active ? read_counter(impl(tensors(i)[1])) : nullptr;
    if (counter != nullptr && *counter == row.step) *counter = row.before;
  }
}

int64_t Slots::num_words() const { return layout().slots() + static_cast<int64_t>(slots_.size()); }

int64_t Slots::num_changed() const {
  if (new_slots_) return num_words();
  if (new_rows_) return layout().slots();
  return new_table_ ? layout().indices() : 0;
}

void Slots::pack(int64_t* words, int64_t count) {
  const auto append = [&](const auto& values) {
    const int64_t all = values.size() * sizeof values[0] / sizeof *words;
    const int64_t taken = std::min(count, all);
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

Slots::Hold::Hold(OwnedSlots slots_to_hold) : slots_(std::move(slots_to_hold)) {
  const Slots& slots = *slots_;
  storages_.reserve(slots.tensors_.size() + slots.size());
  for (const py::object& tensor : slots.tensors_) add(unpack(tensor).storage());
  for (const at::Tensor& grad : slots.grads_held_)
    if (grad.defined()) add(grad.storage());
  slots_->hold_lives_ = true;
}

void Slots::Hold::release() {
  if (!std::exchange(live_, false)) return;
  for (c10::StorageImpl* storage : resizable_)
    if (storage->allocator() != nullptr) storage->set_resizable(true);
  storages_.clear();
  slots_->hold_lives_ = false;
}

void Slots::Hold::add(const c10::Storage& storage) {
  c10::StorageImpl* const found = storage.unsafeGetStorageImpl();
  if (found->resizable()) {
    found->set_resizable(false);
    resizable_.push_back(found);
  }
  storages_.push_back(storage);
}

}  // namespace fused_ema
