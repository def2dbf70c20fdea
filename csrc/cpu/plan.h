// A bucket of dense CPU tensors, ready to step.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ending.h"
#include "slots.h"

namespace fused_ema::cpu {

class Plan {
 public:
  Plan(const std::string& rule, const std::string& variant, OwnedSlots slots, bool ema_before);

  // As Slots::prepare.
  bool prepare(const py::object& fold) { return slots_->prepare(fold); }

  // As Slots::release.
  void release() { slots_->release(); }

  // A pass over all gradients, as prepared.
  //   partial_sums: one float64, for the sum of their squares, the same for any number of threads;
  //   none:
  //         there is no pass, only its end
  void norm(const std::optional<at::Tensor>& partial_sums,
            const std::optional<GivenEnding>& ending);

  // Steps every parameter with a gradient and moves every average.
  //   control: what gradients are multiplied by, first of its float64 numbers; none: by one
  void run(const std::optional<at::Tensor>& control);

  const std::string& target() const { return target_; }

  // See collected().
  template <class Visit>
  int traverse(Visit visit) const {
    return visit(slots_.object().ptr());
  }

 private:
  double sum_of_squares();
  void take_ratios(double grad_factor);
  Piece piece(size_t slot, int64_t begin, int64_t end, double grad_factor) const;
  void run_elements(int64_t begin, int64_t end, double grad_factor) const;

  std::string target_;
  KernelInfo kernel_;
  Squares squares_;
  bool ema_before_;
  OwnedSlots slots_;
  at::Tensor chunks_;           // of gradients, as they are summed
  std::vector<double> ratios_;  // trust ratios; of rules that take no norms 1
};

}  // namespace fused_ema::cpu
