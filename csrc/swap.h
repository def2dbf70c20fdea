// Holds other values in tensors for a while, and then what they held before.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <string>
#include <vector>

namespace fused_ema {

namespace py = pybind11;

// What is kept of one tensor while a swap is open, where Python cannot reach it. The tensor itself
// is held as Python knows it: `torch.utils.swap_tensors` may give that another implementation.
class Held {
 public:
  //   owner: the tensor, as the module knows it
  //   part: what lies in this process, the owner itself but for a DTensor
  //   value: what it holds while the swap is open, None: what it held before
  //   copied: its values are kept; else only its memory is, and a write to it is an error
  Held(py::object owner, py::object part, const py::object& value, bool copied, std::string name);

  // Keeps a copy of the values. Allocates, so that all tensors do before the first is written.
  void keep();

  // Writes the value in. Until restored, autograd sees a version that no write outside can reach.
  void put(uint32_t version);

  // Gives the tensor its memory back, and what a cast has replaced of its gradient.
  void reattach();

  // Gives the memory its values back, and the tensor its version.
  void restore();

  const std::string& name() const { return name_; }

  int traverse(visitproc visit, void* arg) const;

 private:
  void remember_gradient(const at::Tensor& now);
  void reattach_gradient(const at::Tensor& now);

  py::object owner_;
  py::object part_;
  std::string name_;
  bool copied_;
  at::Tensor memory_;  // shares that of the tensor, not its version; undefined: it has none
  at::Tensor target_;  // of what is written, while it is
  at::Tensor value_;
  at::Tensor kept_;
  std::vector<c10::VariableVersion> counters_;  // the owner's and its part's
  std::vector<uint32_t> versions_;
  py::object grad_;
  at::Tensor grad_memory_;
  std::function<void(const at::Tensor&)> reattach_accumulator_;
};

// An entry of a module's dict of parameters or buffers.
struct ModuleEntry {
  py::object dict;
  py::object key;
  py::object value;
  bool fixed;  // else a tensor of another shape may stay there

  void restore() const;
};

// A context manager that puts values into tensors and gives everything back. Entering and leaving
// are calls of C functions: no signal handler runs between the moment the values begin to move and
// the moment that the interpreter knows that it has to leave. Dropped while open, it restores too.
class Swap {
 public:
  //   flag: its attribute `swapped` is True from before the first write to after the last;
  //     check(what) raises where it is already
  //   begin: returns what to hold, the arguments of Held, and the entries to remember; called first
  //   end: called after everything has been restored; may be called twice
  Swap(py::object flag, py::object begin, py::object end);
  ~Swap();

  void enter();

  // Raises RuntimeError for what could not be restored, when the rest has been.
  void exit();

  int traverse(visitproc visit, void* arg) const;

 private:
  enum class State { fresh, open, closed };

  void take(const py::object& begun);
  void put();
  std::vector<std::string> restore();
  void close();

  py::object flag_;
  py::object begin_;
  py::object end_;
  State state_ = State::fresh;
  std::vector<Held> held_;
  std::vector<ModuleEntry> entries_;
};

void define_swap(py::module_& module);

}  // namespace fused_ema
