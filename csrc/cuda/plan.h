// A bucket of dense tensors on a GPU, ready to step by one launch, or by two if its rule takes
// norms.
#pragma once

#include <optional>
#include <string>

#include "cuda/folder.h"
#include "cuda/launch.h"
#include "cuda/stream.h"
#include "cuda/uploads.h"
#include "ending.h"
#include "slots.h"

namespace fused_ema::cuda {

class Plan {
 public:
  Plan(const std::string& rule, const std::string& variant, OwnedSlots slots, bool ema_before);

  // As Slots::prepare.
  bool prepare(const py::object& fold) {
    packed_ = false;
    return slots_->prepare(fold);
  }

  // As Slots::release.
  void release() { slots_->release(); }

  // A pass over all gradients, as prepared, by one launch on the current stream.
  //   partial_sums: for the sums of their squares, num_sums() of them; none: no pass, only its end
  //   ending: of a pass that is the last of several, over all of their sums
  void norm(const std::optional<at::Tensor>& partial_sums,
            const std::optional<GivenEnding>& ending);
  int64_t num_sums() const { return cuda::num_sums(chunks_.size(0)); }

  // Steps every parameter with a gradient and moves every average, on the current stream.
  //   control: on the device, or none; see Launch
  //   groups: of a capturable bucket, what its scalars are folded from; see Folder
  void run(const std::optional<at::Tensor>& control, const std::optional<std::string>& groups);

  // Whether a CUDA graph uses memory that the plan owns.
  bool captured() const { return uploads_.captured(); }

  // What a step is counted in. The kernel skips one by itself.
  const py::object& slots() const { return slots_.object(); }

  // See collected().
  template <class Visit>
  int traverse(Visit visit) const {
    return visit(slots_.object().ptr());
  }

 private:
  Stream enter();
  void pack(bool capturing);
  const int64_t* device_words() const;
  at::Tensor upload(const int64_t* words, int64_t count, bool capturing);

  KernelInfo kernel_;
  Kernel trust_;  // null for a rule that takes no norms
  Squares squares_;
  bool ema_before_;
  OwnedSlots slots_;
  std::optional<Folder> folder_;  // of a capturable bucket
  at::Tensor chunks_;
  at::Tensor ticket_;             // see SquaresLaunch
  at::Tensor neutral_;            // the control of a step that takes gradients as they are
  at::Tensor slot_table_;         // the slots' words on the device
  at::Tensor ratios_, arrivals_;  // of a rule that takes norms; see Launch
  at::Tensor changing_;           // the words before them there, where they are too many to pass
  void* stream_;                  // every one of these is its own, or known to be read there
  std::vector<int64_t> words_;    // as packed
  bool packed_ = false;           // since they were prepared
  Uploads uploads_;
};

}  // namespace fused_ema::cuda
