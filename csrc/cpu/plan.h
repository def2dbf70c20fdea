// A bucket of dense CPU tensors, ready to step.
#pragma once

#include <memory>
#include <string>

#include "slots.h"

namespace fused_ema::cpu {

class Plan {
 public:
  Plan(const std::string& rule, std::shared_ptr<Slots> slots, bool ema_before);

  // As Slots::prepare.
  bool prepare(const py::object& fold) { return slots_->prepare(fold); }

  // Steps every parameter with a gradient and moves every average.
  void run();

  const std::string& target() const { return target_; }

 private:
  void run_elements(int64_t begin, int64_t end) const;

  std::string target_;
  KernelInfo kernel_;
  bool ema_before_;
  std::shared_ptr<Slots> slots_;
};

}  // namespace fused_ema::cpu
