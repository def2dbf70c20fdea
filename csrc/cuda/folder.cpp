#include "cuda/folder.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <stdexcept>
#include <utility>

namespace fused_ema::cuda {

Folder::Folder(const std::string& rule, const Slots& slots)
    : fold_(find_fold(rule)),
      group_size_(fold_.group_size(slots.num_emas())),
      device_(slots.device()) {
  std::vector<int> group_of;
  for (size_t i = 0; i < slots.size(); ++i) {
    num_groups_ += i == 0 || slots.group(i) != slots.group(i - 1);
    group_of.push_back(num_groups_ - 1);
  }
  group_of_ = at::tensor(group_of, at::kInt).to(device_);
  const auto rows = static_cast<int64_t>(slots.size());
  table_ =
      at::zeros({rows, slots.row_layout().size()}, at::TensorOptions(at::kDouble).device(device_));
  arrivals_ = at::zeros({num_groups_}, at::TensorOptions(at::kInt).device(device_));
}

const double* Folder::run(const std::string& groups, const Slots& slots, const double* control,
                          Stream stream) {
  const int64_t begin = num_groups_ * group_size_, num_slots = slots.size();
  if (static_cast<int64_t>(groups.size()) != begin * int64_t{sizeof(int64_t)})
    throw std::invalid_argument("groups: received " + std::to_string(groups.size()) +
                                " bytes, allowed " + std::to_string(begin * sizeof(int64_t)));
  std::vector<int64_t> words(begin + num_slots);
  std::memcpy(words.data(), groups.data(), groups.size());
  for (int64_t i = 0; i < num_slots; ++i) words[begin + i] = slots.counter(i);
  const bool same = words == words_;
  words_ = std::move(words);
  const bool by_value = fold_fits(static_cast<int64_t>(words_.size()));
  if (!by_value && (!same || stream.capturing || !uploaded_.defined())) upload(stream.capturing);
  fold_.launch({by_value ? nullptr : uploaded_.const_data_ptr<int64_t>(), words_.data(),
                static_cast<int64_t>(words_.size()), group_of_.const_data_ptr<int32_t>(),
                num_groups_, static_cast<int>(num_slots), slots.num_emas(),
                slots.storage().rounds(), control, table_.mutable_data_ptr<double>(),
                arrivals_.mutable_data_ptr<int32_t>(), stream.handle});
  if (stream.capturing)
    uploaded_ = at::Tensor();  // what a graph uploads is not there yet for others
  return table_.const_data_ptr<double>();
}

void Folder::record_reader() const {
  for (const at::Tensor* kept : {&group_of_, &table_, &arrivals_, &uploaded_})
    if (kept->defined()) cuda::record_reader(*kept);
}

// A new tensor each time: what an earlier launch reads is not written, and a captured graph's
// stays.
void Folder::upload(bool capturing) {
  const bool spared = capturing && spare_.defined();
  const at::Tensor host = spared ? std::exchange(spare_, {}) : pinned();
  std::memcpy(host.mutable_data_ptr(), words_.data(), words_.size() * sizeof(int64_t));
  uploaded_ = at::empty(host.sizes(), at::TensorOptions(at::kLong).device(device_));
  uploaded_.copy_(host, /*non_blocking=*/true);
  if (capturing) {
    kept_.insert(kept_.end(), {host, uploaded_});
  } else if (!spare_.defined()) {
    spare_ = pinned();
  }
}

at::Tensor Folder::pinned() const {
  const auto options = at::TensorOptions(at::kLong).device(at::kCPU);
  const auto count = static_cast<int64_t>(words_.size());
  return at::empty({count}, options.pinned_memory(!device_.is_cpu()));
}

}  // namespace fused_ema::cuda
