#include "cuda/folder.h"

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <stdexcept>
#include <utility>

namespace fused_ema::cuda {

Folder::Folder(const std::string& rule, const Slots& slots)
    : fold_(find_fold(rule)),
      group_size_(fold_.group_size(slots.num_emas())),
      device_(slots.device()),
      uploads_(device_) {
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
  const auto num_words = static_cast<int64_t>(words_.size());
  const bool by_value = fold_fits(num_words);
  if (!by_value && (!same || stream.capturing || !uploaded_.defined()))
    uploaded_ = uploads_.upload(words_.data(), num_words, stream.capturing, num_words);
  fold_.launch({by_value ? nullptr : uploaded_.const_data_ptr<int64_t>(), words_.data(), num_words,
                group_of_.const_data_ptr<int32_t>(), num_groups_, static_cast<int>(num_slots),
                slots.num_emas(), slots.storage().rounds(), control,
                table_.mutable_data_ptr<double>(), arrivals_.mutable_data_ptr<int32_t>(),
                stream.handle});
  if (stream.capturing)
    uploaded_ = at::Tensor();  // what a graph uploads is not there yet for others
  return table_.const_data_ptr<double>();
}

void Folder::record_reader() const {
  for (const at::Tensor* kept : {&group_of_, &table_, &arrivals_, &uploaded_})
    if (kept->defined()) cuda::record_reader(*kept);
}

}  // namespace fused_ema::cuda
