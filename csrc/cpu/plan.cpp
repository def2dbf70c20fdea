#include "cpu/plan.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace fused_ema::cpu {

namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t grain = 32768;

}  // namespace

Plan::Plan(const std::string& rule, std::shared_ptr<Slots> slots, bool ema_before)
    : target_(chosen_target()),
      kernel_(known(find_kernel(target_, rule, slots->num_states(), slots->stored_type()), rule,
                    slots->num_states(), slots->num_scalars())),
      ema_before_(ema_before),
      slots_(std::move(slots)) {}

void Plan::run() {
  const int64_t total = slots_->offsets().back();
  if (total < grain) {
    run_elements(0, total);
  } else {
    const std::vector<c10::Storage> held = slots_->storages();
    const py::gil_scoped_release released;
    at::parallel_for(0, total, grain,
                     [this](int64_t begin, int64_t end) { run_elements(begin, end); });
  }
  slots_->advance();
}

// Shares out elements, not tensors: threads get equal bytes however unequal the tensors are.
void Plan::run_elements(int64_t begin, int64_t end) const {
  const std::vector<int64_t>& offsets = slots_->offsets();
  size_t i = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
  for (; begin < end; ++i) {
    const int64_t stop = std::min(end, offsets[i + 1]);
    if (stop == begin) continue;
    kernel_.kernel({slots_->pointers(i), slots_->grad(i), begin - offsets[i], stop - offsets[i],
                    slots_->row(i), slots_->num_emas(), ema_before_});
    begin = stop;
  }
}

}  // namespace fused_ema::cpu
