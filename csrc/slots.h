// The slots of a bucket: tensors in, pointers and rows of scalars out.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace fused_ema {

namespace py = pybind11;

// Holds the Python tensors, never their addresses: those are read anew by every prepare(), so that
// `p.data = ...`, a new gradient or a resized storage is seen, and again by begin(): schedules and
// other threads run in between. That the optimizer still holds these tensors is for its Watch to
// say.
//
// What a kernel reads lies in one sequence of words, see WordLayout. The averages of a slot without
// a gradient, null, move alone. One that has elements is never null, and without elements nothing
// is read.
class Slots {
 public:
  //   frozen: a gradient means that the bucket must be made anew
  //   takes_grads: gradients are looked at
  //   states: the first is the master where there is one
  //   param_indices: which of the optimizer's parameters each is, for its random bits
  Slots(int num_scalars, bool frozen, bool takes_grads, bool capturable, bool master,
        std::vector<py::object> params, std::vector<py::object> steps,
        std::vector<std::vector<py::object>> states, std::vector<std::vector<py::object>> emas,
        std::vector<int> groups, const std::vector<int64_t>& param_indices);

  // Reads gradients and pointers and folds the scalars; writes nothing. False: a tensor lies
  // differently now, or a frozen parameter has a gradient, and the bucket must be made anew.
  // Capturable slots have a row each, without scalars: those are folded on the device.
  // The gradients live on until advance() or release(), whoever else drops them.
  bool prepare(const py::object& fold);

  // Reads the addresses anew, right before kernels use them; throws where a tensor lies differently
  // now. While Python or another thread may run before the kernels have ended or are in a stream's
  // order, the memory must be held.
  void begin();

  // As begin(), of the gradients alone.
  void begin_gradients();

  // What keeps all memory of the step where it is, as long as it lives: storages, which nobody can
  // resize meanwhile. Nothing can be prepared then.
  class Hold;

  // Counts the step that was prepared, tells autograd of it and lets go of the gradients.
  void advance();

  // Lets go of the gradients of a step that was prepared, and is not taken.
  void release() { grads_held_.clear(); }

  // Takes the count of the last step back, where nobody else has written the counter since.
  void uncount();

  int64_t num_words() const;

  // Where they lie. Those before the slots are what changes from step to step.
  WordLayout layout() const {
    return {static_cast<int64_t>(table_.size()), static_cast<int64_t>(size())};
  }
  SlotLayout slot_layout() const { return {master_, num_states(), num_emas_}; }

  // How many leading words differ from those that were last packed.
  int64_t num_changed() const;

  // Writes the first `count` words, or as many as there are.
  void pack(int64_t* words, int64_t count);

  // (slot, index) of each run of `elements` elements, the last of a slot shorter: int32 [n, 2].
  at::Tensor chunks(int64_t elements) const;

  // Where each slot's steps are counted, see counter().
  std::vector<int64_t> counters() const;

  // See collected().
  template <class Visit>
  int traverse(Visit visit) const {
    for (const py::object& tensor : tensors_)
      if (const int stop = visit(tensor.ptr())) return stop;
    return 0;
  }

  RowLayout row_layout() const { return {num_scalars_, num_emas_, rounds_}; }
  size_t size() const { return groups_.size(); }
  c10::Device device() const { return device_; }
  bool capturable() const { return capturable_; }
  int num_scalars() const { return num_scalars_; }
  // The rule's states.
  int num_states() const { return num_states_ - master_; }
  Storage storage() const { return storage_; }
  int num_emas() const { return num_emas_; }
  int num_rows() const { return static_cast<int>(rows_.size()); }
  const std::vector<int64_t>& offsets() const { return offsets_; }
  int64_t numel(size_t i) const { return offsets_[i + 1] - offsets_[i]; }
  int group(size_t i) const { return groups_[i]; }
  // The address of a slot's count, plus one where it has a gradient.
  int64_t counter(size_t i) const {
    return reinterpret_cast<int64_t>(counters_[i]) + rows_[row_of_[i]].active;
  }
  const double* row(size_t i) const { return table_.data() + row_of_[i] * row_layout().size(); }
  const void* grad(size_t i) const { return reinterpret_cast<const void*>(grads_[i]); }
  // param, its master if there is one, the rule's states, the averages
  void* const* pointers(size_t i) const {
    return reinterpret_cast<void* const*>(slot(i) + SlotLayout::param);
  }
  // The slot's random key at this step; 0 if nothing takes random bits.
  uint32_t key(size_t i) const {
    if (!rounds_) return 0;
    const auto seed = static_cast<uint32_t>(row(i)[row_layout().seed()]);
    return parameter_key(seed, static_cast<uint32_t>(slot(i)[SlotLayout::param_index]));
  }

 private:
  // Parameters of one group at one step count share a row of scalars.
  struct Row {
    int group;
    bool active;  // has a gradient; else the averages alone move
    double before;
    double step;  // counted
  };

  // How a slot's first, second, ... tensors are stored.
  struct Kind {
    explicit Kind(at::ScalarType type)
        : dtype(type), itemsize(static_cast<int64_t>(c10::elementSize(type))) {}
    at::ScalarType dtype;
    int64_t itemsize;
  };

  // How a parameter lay when the slots were made.
  struct Shape {
    c10::DispatchKeySet keys;  // kind of device and layout
    int64_t numel;
    bool contiguous;
    int64_t dim;
    size_t strides;  // where its strides begin in strides_
  };

  size_t num_tensors() const { return 2 + num_states_ + num_emas_; }
  const int64_t* slot(size_t i) const { return &slots_[i * slot_layout().size()]; }
  int64_t* slot(size_t i) { return &slots_[i * slot_layout().size()]; }
  const py::object* tensors(size_t i) const { return &tensors_[i * num_tensors()]; }
  uint16_t find_row(const Row& row);
  void fold_rows(const py::object& fold);
  void fetch(size_t i) const;
  double* read_counter(const c10::TensorImpl& step) const;
  bool read_pointers(size_t i);
  void read_gradient(size_t i);
  bool as_planned(const c10::TensorImpl& tensor, const Kind& kind, const Shape& shape) const;
  bool same_strides(const c10::TensorImpl& tensor, const Shape& shape) const;
  bool fits(const at::Tensor& grad, const at::Tensor& param) const;
  bool fits_otherwise(const at::Tensor& grad, const at::Tensor& param) const;
  at::Tensor copy_grad(const at::Tensor& grad, const at::Tensor& param) const;

  int num_scalars_;
  bool frozen_;
  bool takes_grads_;
  bool capturable_;
  bool master_;
  Kind stored_;  // parameters and gradients
  c10::Device device_;
  int num_states_;  // with the master
  int num_emas_;
  std::vector<py::object> tensors_;  // per slot: param, step, states, averages
  std::vector<Kind> kinds_;          // of those
  Storage storage_;
  bool rounds_;
  std::vector<int> groups_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> strides_;  // of all parameters, in turn
  std::vector<int64_t> offsets_;  // first element of each slot in the bucket, and the total

  // filled by prepare()
  std::vector<double> table_;
  std::vector<uint16_t> row_of_;  // whole words of them
  std::vector<int64_t> grads_;
  std::vector<int64_t> slots_;
  std::vector<double*> counters_;
  std::vector<Row> rows_;
  std::vector<at::Tensor> grads_held_;  // or copies laid out like their parameter; undefined: none

  bool hold_lives_ = false;

  // since the last pack()
  bool new_table_ = true;
  bool new_rows_ = true;  // or gradients
  bool new_slots_ = true;
};

// The slots of a plan, which owns their Python object: the garbage collector sees both, and the way
// from one to the other.
class OwnedSlots {
 public:
  OwnedSlots(py::object object)  // converts: plans are made of it in Python
      : object_(std::move(object)), slots_(&object_.cast<Slots&>()) {}

  Slots* operator->() const { return slots_; }
  Slots& operator*() const { return *slots_; }
  const py::object& object() const { return object_; }

 private:
  py::object object_;
  Slots* slots_;
};

class Slots::Hold {
 public:
  explicit Hold(OwnedSlots slots);
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  ~Hold() { release(); }

  void release();

 private:
  void add(const c10::Storage& storage);

  OwnedSlots slots_;
  bool live_ = true;
  std::vector<c10::Storage> storages_;
  std::vector<c10::StorageImpl*> resizable_;  // of those, as they were found
};

}  // namespace fused_ema
