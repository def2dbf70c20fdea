#include "cpu/plan.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

namespace fused_ema::cpu {

namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t grain = 32768;
// Elements of a gradient that are summed on their own: few enough for float to be exact enough.
constexpr int64_t sum_size = 4096;

KernelInfo find(const std::string& target, const RuleId& rule, const Slots& slots) {
  return known(find_kernel(target, rule, slots.storage()), rule, slots.num_scalars());
}

}  // namespace

Plan::Plan(const std::string& rule, const std::string& variant, OwnedSlots slots, bool ema_before)
    : target_(chosen_target()),
      kernel_(find(target_, {rule, variant, slots->num_states()}, *slots)),
      squares_(find_squares(target_, slots->storage().type)),
      ema_before_(ema_before),
      slots_(std::move(slots)),
      chunks_(slots_->chunks(sum_size)),
      ratios_(slots_->size(), 1) {}

void Plan::norm(const std::optional<at::Tensor>& partial_sums,
                const std::optional<GivenEnding>& given) {
  if (partial_sums) *partial_sums->mutable_data_ptr<double>() = sum_of_squares();
  const Ending ending = as_ending(given);
  if (ending.control == nullptr) return;
  const double squares = std::accumulate(ending.sums, ending.sums + ending.num_sums, 0.0);
  decide(ending.treatment, squares, ending.control);
}

double Plan::sum_of_squares() {
  slots_->begin_gradients();
  const int32_t* chunks = chunks_.const_data_ptr<int32_t>();
  std::vector<double> sums(chunks_.size(0), 0.0);
  const auto sum = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t slot = chunks[2 * i];
      const int64_t first = chunks[2 * i + 1] * sum_size;
      const int64_t last = std::min(first + sum_size, slots_->numel(slot));
      if (slots_->grad(slot) != nullptr) sums[i] = squares_(slots_->grad(slot), first, last);
    }
  };
  {
    const Slots::Hold hold(slots_);
    const py::gil_scoped_release released;
    at::parallel_for(0, chunks_.size(0), grain / sum_size, sum);
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void Plan::run(const std::optional<at::Tensor>& control) {
  const double grad_factor = control ? *control->const_data_ptr<double>() : 1.0;
  const int64_t total = slots_->offsets().back();
  slots_->begin();
  std::optional<Slots::Hold> hold;
  if (total < grain) {
    take_ratios(grad_factor);
    run_elements(0, total, grad_factor);
  } else {
    hold.emplace(slots_);
    const py::gil_scoped_release released;
    take_ratios(grad_factor);
    at::parallel_for(0, total, grain,
                     [&](int64_t begin, int64_t end) { run_elements(begin, end, grad_factor); });
  }
  slots_->advance();
}

// The trust ratios of the parameters that are stepped: the sums of chunks, added up in their order.
void Plan::take_ratios(double grad_factor) {
  if (kernel_.measure == nullptr) return;
  const auto takes = [&](size_t i) {
    return slots_->grad(i) != nullptr && slots_->row(i)[kernel_.num_scalars - 1] != 0;
  };
  const int32_t* chunks = chunks_.const_data_ptr<int32_t>();
  const int64_t num_chunks = chunks_.size(0);
  std::vector<double> sums(2 * num_chunks, 0.0), totals(2 * slots_->size(), 0.0);
  at::parallel_for(0, num_chunks, grain / sum_size, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t slot = chunks[2 * k], first = chunks[2 * k + 1] * sum_size;
      const int64_t last = std::min(first + sum_size, slots_->numel(slot));
      if (takes(slot)) kernel_.measure(piece(slot, first, last, grad_factor), &sums[2 * k]);
    }
  });
  for (int64_t k = 0; k < num_chunks; ++k)
    for (int which : {0, 1}) totals[2 * chunks[2 * k] + which] += sums[2 * k + which];
  for (size_t i = 0; i < ratios_.size(); ++i)
    ratios_[i] = takes(i) ? kernel_.ratio(&totals[2 * i], slots_->row(i)) : 1;
}

Piece Plan::piece(size_t slot, int64_t begin, int64_t end, double grad_factor) const {
  return {slots_->pointers(slot),
          slots_->grad(slot),
          begin,
          end,
          slots_->row(slot),
          grad_factor,
          slots_->num_emas(),
          ema_before_,
          slots_->storage().ema_format,
          slots_->key(slot),
          ratios_[slot]};
}

// Shares out elements, not tensors: threads get equal bytes however unequal the tensors are.
void Plan::run_elements(int64_t begin, int64_t end, double grad_factor) const {
  const std::vector<int64_t>& offsets = slots_->offsets();
  size_t i = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
  for (; begin < end; ++i) {
    const int64_t stop = std::min(end, offsets[i + 1]);
    if (stop == begin) continue;
    kernel_.kernel(piece(i, begin - offsets[i], stop - offsets[i], grad_factor));
    begin = stop;
  }
}

}  // namespace fused_ema::cpu
