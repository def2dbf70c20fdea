// A bucket of dense tensors, ready to step: tensors in, pointers and pieces out.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "kernels.h"

namespace fused_ema {

namespace py = pybind11;

// Holds the Python tensors, never their addresses: those are read anew by every prepare(), so that
// `p.data = ...`, a new gradient or a resized storage is seen. That the optimizer still holds these
// tensors is for its Watch to say.
class Plan {
 public:
  Plan(std::string rule, std::vector<py::object> params, std::vector<py::object> steps,
       std::vector<std::vector<py::object>> states, std::vector<std::vector<py::object>> emas,
       std::vector<int> groups, bool ema_before);

  // Reads gradients and pointers and folds the scalars; writes nothing. False: a tensor lies
  // differently now, or a frozen parameter has a gradient, and the bucket must be made anew.
  bool prepare(const py::object& fold);

  // Steps every parameter with a gradient and moves every average.
  void run();

  const std::string& target() const { return target_; }

 private:
  // Parameters of one group at one step count share a row of scalars.
  struct Row {
    int group;
    bool active;  // has a gradient; else the averages alone move
    double step;
  };

  // How a parameter lay when the plan was made.
  struct Shape {
    c10::DispatchKeySet keys;  // device and layout
    bool contiguous;
    int64_t dim;
    size_t strides;  // where its strides begin in strides_
  };

  int row_size() const { return kernel_.num_scalars + num_emas_; }
  int find_row(const Row& row);
  void fold_rows(const py::object& fold);
  bool read_pointers(size_t i, const at::Tensor& param);
  bool as_planned(const at::Tensor& tensor, size_t i, at::ScalarType dtype) const;
  bool same_strides(const at::Tensor& tensor, const Shape& shape) const;
  bool is_active(size_t i) const { return rows_[row_of_[i]].active; }
  std::vector<c10::Storage> storages() const;
  void* grad_pointer(const at::Tensor& grad, const at::Tensor& param);
  void run_elements(int64_t begin, int64_t end) const;

  std::string rule_;
  std::string target_;
  KernelInfo kernel_;
  at::ScalarType stored_;   // parameters, gradients, states
  at::ScalarType average_;  // arithmetic and averages
  int64_t stored_size_;
  int64_t average_size_;
  int num_states_;
  int num_emas_;
  int stride_;  // pointers per parameter
  bool frozen_;
  bool ema_before_;
  std::vector<py::object> tensors_;  // per parameter: param, step, states, averages
  std::vector<int> groups_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> strides_;  // of all parameters, in turn
  std::vector<int64_t> offsets_;  // first element of each parameter in the bucket, and the total

  // filled by prepare()
  std::vector<void*> pointers_;
  std::vector<double*> counters_;
  std::vector<int> row_of_;
  std::vector<Row> rows_;
  std::vector<double> table_;
  std::vector<at::Tensor> copies_;  // gradients that had to be laid out like their parameter
};

// Whether a tensor is nothing but memory of its own: no subclass, no lazy negation or conjugation.
bool is_plain(const at::Tensor& tensor);

}  // namespace fused_ema
