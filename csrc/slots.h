// The slots of a bucket: tensors in, pointers and rows of scalars out.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fused_ema {

namespace py = pybind11;

// Holds the Python tensors, never their addresses: those are read anew by every prepare(), so that
// `p.data = ...`, a new gradient or a resized storage is seen. That the optimizer still holds these
// tensors is for its Watch to say.
//
// What a kernel reads lies in one sequence of words, those that change most often first:
//   scalars  a row of doubles: the rule's scalars, a weight per average; where something is rounded
//            by random bits, the seed of the step
//   rows     the row of each slot
//   grads    each slot's gradient, null without one: the averages alone move
//   slots    numel, which of the optimizer's parameters it is; addresses: param, its master if
//            there is one, the rule's states, the averages, the first one's copy if there is one
class Slots {
 public:
  //   frozen: a gradient means that the bucket must be made anew
  //   takes_grads: gradients are looked at
  //   states: the first is the master where there is one
  //   emas: the last is a bfloat16 copy of the first average where there is a teacher
  //   places: which of the optimizer's parameters each is, for its random bits
  Slots(int num_scalars, bool frozen, bool takes_grads, bool capturable, bool master, bool teacher,
        std::vector<py::object> params, std::vector<py::object> steps,
        std::vector<std::vector<py::object>> states, std::vector<std::vector<py::object>> emas,
        std::vector<int> groups, const std::vector<int64_t>& places);

  // Reads gradients and pointers and folds the scalars; writes nothing. False: a tensor lies
  // differently now, or a frozen parameter has a gradient, and the bucket must be made anew.
  // Capturable slots have a row each, without scalars: those are folded on the device.
  bool prepare(const py::object& fold);

  // Counts the step that was prepared, tells autograd of it and drops copies of gradients.
  void advance();

  // Takes the count of the last step back, where nobody else has written the counter since.
  void uncount();

  int64_t num_words() const;

  // Words before the slots: what changes from step to step.
  int64_t num_changing() const { return num_words() - static_cast<int64_t>(slots_.size()); }

  // Words before the gradients.
  int64_t grads_at() const { return num_changing() - static_cast<int64_t>(grads_.size()); }

  // How many leading words differ from those that were last packed.
  int64_t num_changed() const;

  // Writes the first `count` words, or as many as there are.
  void pack(int64_t* words, int64_t count);

  // (slot, index) of each run of `elements` elements, the last of a slot shorter: int32 [n, 2].
  at::Tensor chunks(int64_t elements) const;

  // What the tensors own: whatever another thread drops must outlive a step without the GIL.
  std::vector<c10::Storage> storages() const;

  // Which slots have a gradient.
  std::vector<bool> active() const;

  // See collected().
  template <class Visit>
  int traverse(Visit visit) const {
    for (const py::object& tensor : tensors_)
      if (const int stop = visit(tensor.ptr())) return stop;
    return 0;
  }

  size_t size() const { return groups_.size(); }
  size_t slot_size() const { return 1 + num_tensors(); }
  c10::Device device() const { return device_; }
  bool capturable() const { return capturable_; }
  int num_scalars() const { return num_scalars_; }
  // The rule's states.
  int num_states() const { return num_states_ - master_; }
  Storage storage() const { return storage_; }
  int num_emas() const { return num_emas_; }
  bool teacher() const { return teacher_; }
  int num_rows() const { return static_cast<int>(rows_.size()); }
  const std::vector<int64_t>& offsets() const { return offsets_; }
  int64_t numel(size_t i) const { return offsets_[i + 1] - offsets_[i]; }
  int group(size_t i) const { return groups_[i]; }
  const double* row(size_t i) const { return table_.data() + row_of_[i] * row_size(); }
  const void* grad(size_t i) const { return reinterpret_cast<const void*>(grads_[i]); }
  // param, its master if there is one, the rule's states, the averages, their copy
  void* const* pointers(size_t i) const {
    return reinterpret_cast<void* const*>(&slots_[i * slot_size() + 2]);
  }
  // Of the random bits of the step, 0 where nothing takes any.
  uint32_t key(size_t i) const {
    if (!rounds_) return 0;
    const auto seed = static_cast<uint32_t>(row(i)[num_scalars_ + num_emas_]);
    return parameter_key(seed, static_cast<uint32_t>(slots_[i * slot_size() + 1]));
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

  size_t num_tensors() const { return 2 + num_states_ + num_emas_ + teacher_; }
  size_t row_size() const { return num_scalars_ + num_emas_ + rounds_; }
  const py::object* tensors(size_t i) const { return &tensors_[i * num_tensors()]; }
  int64_t find_row(const Row& row);
  void fold_rows(const py::object& fold);
  void fetch(size_t i) const;
  double* read_counter(const c10::TensorImpl& step) const;
  bool read_pointers(size_t i);
  bool as_planned(const c10::TensorImpl& tensor, const Kind& kind, const Shape& shape) const;
  bool same_strides(const c10::TensorImpl& tensor, const Shape& shape) const;
  void* grad_pointer(const at::Tensor& grad, const at::Tensor& param);
  void* copy_grad(const at::Tensor& grad, const at::Tensor& param);

  int num_scalars_;
  bool frozen_;
  bool takes_grads_;
  bool capturable_;
  bool master_;
  bool teacher_;
  Kind stored_;  // parameters and gradients
  c10::Device device_;
  int num_states_;  // with the master
  int num_emas_;
  std::vector<py::object> tensors_;  // per slot: param, step, states, averages, copy
  std::vector<Kind> kinds_;          // of those
  Storage storage_;
  bool rounds_;
  std::vector<int> groups_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> strides_;  // of all parameters, in turn
  std::vector<int64_t> offsets_;  // first element of each slot in the bucket, and the total

  // filled by prepare()
  std::vector<double> table_;
  std::vector<int64_t> row_of_;
  std::vector<int64_t> grads_;
  std::vector<int64_t> slots_;
  std::vector<double*> counters_;
  std::vector<Row> rows_;
  std::vector<at::Tensor> copies_;  // gradients that had to be laid out like their parameter

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
  const py::object& object() const { return object_; }

 private:
  py::object object_;
  Slots* slots_;
};

// Whether a tensor is nothing but memory of its own: no subclass, no lazy negation or conjugation.
bool is_plain(const at::Tensor& tensor);

}  // namespace fused_ema
