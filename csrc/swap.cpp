#include "swap.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace fused_ema {

namespace {

namespace impl = torch::autograd::impl;

// Versions from here on are those of tensors inside a swap: a graph that was made on one side of it
// and runs backward on the other finds another version than it saved, whatever is written after.
constexpr uint32_t inside = 1u << 31;
// How many writes inside have versions of their own.
constexpr uint32_t writes = 1u << 12;

uint32_t next_version() {
  static uint32_t count = 0;
  return inside + count++ * writes % inside;
}

// Operators of this library alone: none of autograd's, and no dispatch mode, which would be Python.
class Direct {
  c10::InferenceMode no_inference{false};
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_modes{
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

// Operators of a tensor subclass, which may be Python.
class Dispatched {
  c10::InferenceMode no_inference{false};
  at::NoGradGuard no_grad;
};

bool is_subclass(const at::Tensor& tensor) {
  return tensor.key_set().has(c10::DispatchKey::Python);
}

template <class Function>
void run_for(const at::Tensor& tensor, Function function) {
  if (is_subclass(tensor)) {
    Dispatched guard;
    function();
  } else {
    Direct guard;
    function();
  }
}

const at::Tensor& unpack(const py::object& tensor) { return THPVariable_Unpack(tensor.ptr()); }

bool is_tensor(const py::object& object) { return object && THPVariable_Check(object.ptr()); }

bool has_memory(const at::Tensor& tensor) {
  return tensor.layout() == c10::kStrided && !tensor.is_quantized() && tensor.has_storage() &&
         !is_subclass(tensor);
}

// The same memory under another tensor, whose version and gradient are its own.
at::Tensor same_memory(const at::Tensor& tensor) { return tensor.variable_data(); }

bool lies_in(const at::Tensor& tensor, const at::Tensor& memory) {
  return tensor.has_storage() && tensor.is_alias_of(memory) && tensor.dtype() == memory.dtype() &&
         tensor.storage_offset() == memory.storage_offset() && tensor.sizes() == memory.sizes() &&
         tensor.strides() == memory.strides() && tensor.key_set() == memory.key_set();
}

int64_t span(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return tensor.numel() == 0 ? 0 : last + 1;
}

bool is_whole(const at::Tensor& memory) {
  const auto itemsize = static_cast<int64_t>(memory.itemsize());
  const int64_t needed = (memory.storage_offset() + span(memory)) * itemsize;
  return span(memory) == 0 || static_cast<int64_t>(memory.storage().nbytes()) >= needed;
}

// Every element once, also of an expanded tensor.
at::Tensor elements(const at::Tensor& memory) {
  if (at::has_internal_overlap(memory) != at::MemOverlap::Yes) return memory;
  return memory.as_strided({span(memory)}, {1}, memory.storage_offset());
}

template <class Node>
std::weak_ptr<Node> weak(const std::shared_ptr<Node>& node) {
  return node;
}

template <class Node>
c10::weak_intrusive_ptr<Node> weak(const c10::intrusive_ptr<Node>& node) {
  return c10::weak_intrusive_ptr<Node>(node);
}

std::string message(std::exception_ptr error) {
  try {
    std::rethrow_exception(std::move(error));
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  } catch (const std::exception& e) {
    return e.what();
  }
}

}  // namespace

Held::Held(py::object owner, py::object part, const py::object& value, bool copied,
           std::string name)
    : owner_(std::move(owner)), part_(std::move(part)), name_(std::move(name)), copied_(copied) {
  const at::Tensor& now = unpack(part_);
  target_ = now;
  if (!value.is_none()) value_ = unpack(value);
  if (has_memory(now)) memory_ = same_memory(now);
  for (const at::Tensor* tensor : {&unpack(owner_), &now}) {
    if (tensor->is_inference()) continue;
    counters_.push_back(impl::version_counter(*tensor));
    versions_.push_back(counters_.back().current_version());
    if (value_.defined() && versions_.back() >= inside)
      throw std::runtime_error("ema_weights(): " + name_ +
                               " holds another optimizer's average; leave that context first");
  }
  if (!is_subclass(now)) remember_gradient(now);
}

void Held::remember_gradient(const at::Tensor& now) {
  if (!now.is_leaf()) return;
  if (now.grad().defined()) {
    grad_ = py::reinterpret_steal<py::object>(THPVariable_Wrap(now.grad()));
    if (has_memory(now.grad())) grad_memory_ = same_memory(now.grad());
  }
  // A cast makes autograd forget it, with the hooks that DistributedDataParallel has put there.
  auto accumulator = impl::try_get_grad_accumulator(now);
  if (accumulator)
    reattach_accumulator_ = [node = weak(accumulator)](const at::Tensor& tensor) {
      if (node.lock()) impl::set_grad_accumulator(tensor, node);
    };
}

void Held::keep() {
  if (!copied_ || target_.is_meta()) return;
  if (memory_.defined()) {
    Direct guard;
    kept_ = elements(memory_).clone();
  } else {
    run_for(target_, [&] { kept_ = target_.detach().clone(); });
  }
}

void Held::put(uint32_t version) {
  if (value_.defined()) {
    for (auto& counter : counters_) counter.set_version(version);
    if (memory_.defined() && !is_subclass(value_)) {
      Direct guard;
      memory_.copy_(value_);
    } else {
      run_for(target_, [&] { target_.detach().copy_(value_); });
    }
  }
  value_.reset();
  target_.reset();
}

void Held::reattach() {
  value_.reset();
  at::Tensor now = target_ = unpack(part_);
  if (memory_.defined()) {
    // a storage that was made smaller has lost its memory: the copy takes its place
    const bool whole = is_whole(memory_);
    if (!whole && kept_.defined() && kept_.sizes() == memory_.sizes())
      now.set_data(kept_);
    else if (!whole)
      throw std::runtime_error("its storage was resized");
    else if (!lies_in(now, memory_))
      now.set_data(memory_);
  } else if (kept_.defined() && !is_subclass(now)) {
    now.set_data(kept_);
  }
  if (!is_subclass(now)) reattach_gradient(now);
  if (!owner_.is(part_) && !py::object(owner_.attr("_local_tensor")).is(part_))
    throw std::runtime_error("its local tensor was replaced");
}

void Held::reattach_gradient(const at::Tensor& now) {
  if (reattach_accumulator_) reattach_accumulator_(now);
  if (!grad_ || !grad_memory_.defined()) return;
  const at::Tensor& old = unpack(grad_);
  if (!now.is_leaf()) return;
  const at::Tensor current = now.grad();
  // what the user has put there of the right kind is the user's
  const bool cast = current.defined() && !current.options().type_equal(grad_memory_.options());
  if (!cast && !current.is_same(old)) return;
  at::Tensor grad = old;
  if (!lies_in(grad, grad_memory_)) grad.set_data(grad_memory_);
  if (!current.is_same(grad)) now.mutable_grad() = grad;
}

void Held::restore() {
  const bool written =
      !copied_ && !counters_.empty() && counters_[0].current_version() != versions_[0];
  if (kept_.defined() && memory_.defined() && is_whole(memory_)) {
    Direct guard;
    elements(memory_).copy_(kept_);
  } else if (kept_.defined() && is_subclass(target_)) {
    run_for(target_, [&] { target_.detach().copy_(kept_); });
  }
  if (written) throw std::runtime_error("it was written in place, and no copy of it is kept");
  for (size_t i = 0; i < counters_.size(); ++i) counters_[i].set_version(versions_[i]);
  // torch.utils.swap_tensors has given it another
  if (!counters_.empty() && !target_.is_inference()) {
    auto counter = impl::version_counter(target_);
    counter.set_version(versions_.back());
  }
}

int Held::traverse(visitproc visit, void* arg) const {
  Py_VISIT(owner_.ptr());
  Py_VISIT(part_.ptr());
  Py_VISIT(grad_.ptr());
  return 0;
}

void ModuleEntry::restore() const {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetItem(dict.ptr(), key.ptr()));
  if (found.is(value)) return;
  if (!found) PyErr_Clear();
  if (!fixed && is_tensor(found) && is_tensor(value) &&
      unpack(found).sizes() != unpack(value).sizes())
    return;
  if (PyObject_SetItem(dict.ptr(), key.ptr(), value.ptr()) != 0) throw py::error_already_set();
}

Swap::Swap(py::object flag, py::object begin, py::object end)
    : flag_(std::move(flag)), begin_(std::move(begin)), end_(std::move(end)) {}

Swap::~Swap() {
  if (state_ != State::open) return;
  py::error_scope scope;
  try {
    close();
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("ema_weights()");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    PyErr_WriteUnraisable(nullptr);
  }
}

void Swap::enter() {
  if (state_ != State::fresh)
    throw std::runtime_error("ema_weights(): this context has been entered before; make a new one");
  while (py::cast<bool>(flag_.attr("swapped"))) flag_.attr("check")("ema_weights()");
  flag_.attr("swapped") = true;
  try {
    take(begin_());
    put();
  } catch (...) {
    restore();
    flag_.attr("swapped") = false;
    throw;
  }
  state_ = State::open;
}

void Swap::exit() {
  if (state_ != State::open) throw std::runtime_error("ema_weights(): the context is not open");
  close();
}

void Swap::take(const py::object& begun) {
  for (const py::handle item : begun.attr("tensors")) {
    const auto [owner, part, value, copied, name] =
        py::cast<std::tuple<py::object, py::object, py::object, bool, std::string>>(item);
    held_.emplace_back(owner, part, value, copied, name);
  }
  for (const py::handle item : begun.attr("entries")) {
    const auto [dict, key, value, fixed] =
        py::cast<std::tuple<py::object, py::object, py::object, bool>>(item);
    entries_.push_back({dict, key, value, fixed});
  }
}

void Swap::put() {
  const uint32_t version = next_version();
  py::gil_scoped_release released;
  for (Held& held : held_) held.keep();
  for (Held& held : held_) held.put(version);
}

std::vector<std::string> Swap::restore() {
  std::vector<std::string> lost;
  for (const ModuleEntry& entry : entries_) {
    try {
      entry.restore();
    } catch (...) {
      lost.push_back(py::cast<std::string>(py::str(entry.key)) + ": " +
                     message(std::current_exception()));
    }
  }
  const auto each = [&](void (Held::*method)()) {
    for (Held& held : held_) {
      try {
        (held.*method)();
      } catch (...) {
        lost.push_back(held.name() + ": " + message(std::current_exception()));
      }
    }
  };
  each(&Held::reattach);
  {
    py::gil_scoped_release released;
    each(&Held::restore);
  }
  entries_.clear();
  held_.clear();
  return lost;
}

void Swap::close() {
  state_ = State::closed;
  const std::vector<std::string> lost = restore();
  // what end() drops must go even where a signal handler raises in it
  std::exception_ptr error;
  for (int tries = 0; tries < 2; ++tries) {
    try {
      end_();
      break;
    } catch (...) {
      if (!error) error = std::current_exception();
    }
  }
  flag_.attr("swapped") = false;
  if (!lost.empty()) {
    std::string text = "ema_weights(): could not restore";
    for (size_t i = 0; i < lost.size(); ++i) text += (i == 0 ? " " : "; ") + lost[i];
    throw std::runtime_error(text);
  }
  if (error) std::rethrow_exception(error);
}

int Swap::traverse(visitproc visit, void* arg) const {
  for (const auto* object : {&flag_, &begin_, &end_}) Py_VISIT(object->ptr());
  for (const Held& held : held_)
    if (const int result = held.traverse(visit, arg)) return result;
  for (const ModuleEntry& entry : entries_)
    for (const auto* object : {&entry.dict, &entry.key, &entry.value}) Py_VISIT(object->ptr());
  return 0;
}

namespace {

// So that the cyclic collector sees what the swap holds.
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    auto* instance = reinterpret_cast<py::detail::instance*>(self);
    if (!instance->get_value_and_holder().holder_constructed()) return 0;
    return py::cast<Swap&>(py::handle(self)).traverse(visit, arg);
  };
  type.tp_clear = [](PyObject*) { return 0; };
}

}  // namespace

void define_swap(py::module_& module) {
  py::class_<Swap>(module, "Swap", py::custom_type_setup(make_collectable))
      .def(py::init<py::object, py::object, py::object>(), py::arg("flag"), py::arg("begin"),
           py::arg("end"))
      .def("__enter__", &Swap::enter)
      .def("__exit__", [](Swap& self, const py::args&) { self.exit(); });
}

}  // namespace fused_ema
