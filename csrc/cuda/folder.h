// Folds the scalars of a capturable bucket on its GPU.
#pragma once

#include <string>
#include <vector>

#include "cuda/fold.h"
#include "cuda/stream.h"
#include "cuda/uploads.h"
#include "slots.h"

namespace fused_ema::cuda {

class Folder {
 public:
  Folder(const std::string& rule, const Slots& slots);

  // Counts the step of every slot with a gradient and folds its scalars, on a stream.
  //   groups: the records of the bucket's param groups, see FoldLaunch
  //   slots: which have been read by begin()
  //   control: on the device, as a step's
  // Returns a row a slot, on the device, which later calls write anew.
  const double* run(const std::string& groups, const Slots& slots, const double* control,
                    Stream stream);

  // Says that the current stream reads all that is kept, see Plan::enter().
  void record_reader() const;

 private:
  FoldInfo fold_;
  int num_groups_ = 0;
  int64_t group_size_;
  c10::Device device_;
  at::Tensor group_of_;  // which of the bucket's groups is a slot's, int32
  at::Tensor table_;
  at::Tensor arrivals_;
  std::vector<int64_t> words_;  // of the last launch
  at::Tensor uploaded_;         // those, where they are too many to pass
  Uploads uploads_;
};

}  // namespace fused_ema::cuda
