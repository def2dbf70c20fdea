// A bucket of dense CPU tensors, ready to step.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "slots.h"

namespace fused_ema::cpu {

class Plan {
 public:
  // tensors: which parameter of the optimizer each slot is, for the random bits of its averages
  Plan(const std::string& rule, std::shared_ptr<Slots> slots, bool ema_before,
       const std::string& ema_format, std::vector<uint32_t> tensors);

  // As Slots::prepare.
  bool prepare(const py::object& fold);

  // The sum of the squares of all gradients, as prepared, the same for any number of threads.
  at::Tensor sum_of_squares() const;

  // Steps every parameter with a gradient and moves every average.
  //   control: what gradients are multiplied by, first of its float64 numbers; none: by one
  void run(const std::optional<at::Tensor>& control);

  const std::string& target() const { return target_; }

 private:
  void run_elements(int64_t begin, int64_t end, double grad_factor) const;

  std::string target_;
  KernelInfo kernel_;
  Squares squares_;
  bool ema_before_;
  EmaFormat ema_format_;
  std::shared_ptr<Slots> slots_;
  at::Tensor chunks_;  // of gradients, as they are summed
  std::vector<uint32_t> tensors_;
  std::vector<uint32_t> ema_keys_;  // of each slot, at the step that is prepared
};

}  // namespace fused_ema::cpu
