#include "cuda/plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>

namespace fused_ema::cuda {

namespace {

KernelInfo find(const RuleId& rule, const Slots& slots) {
  return known(find_kernel(rule, slots.storage()), rule, slots.num_scalars());
}

}  // namespace

Plan::Plan(const std::string& rule, const std::string& variant, OwnedSlots slots, bool ema_before)
    : kernel_(find({rule, variant, slots->num_states()}, *slots)),
      trust_(find_trust({rule, variant, slots->num_states()}, slots->storage())),
      squares_(find_squares(slots->storage().type)),
      ema_before_(ema_before),
      slots_(std::move(slots)),
      folder_(slots_->capturable() ? std::optional(Folder(rule, *slots_)) : std::nullopt),
      chunks_(slots_->chunks(chunk_elements(slots_->storage().type)).to(slots_->device())),
      ticket_(at::zeros({1}, at::TensorOptions(at::kInt).device(slots_->device()))),
      neutral_(at::tensor({1.0, 0.0}, at::kDouble).to(slots_->device())),
      uploads_(slots_->device()) {
  const c10::DeviceGuard guard(slots_->device());
  stream_ = current_stream(slots_->device()).handle;
  if (trust_ == nullptr) return;
  const at::TensorOptions there(slots_->device());
  const auto num_slots = static_cast<int64_t>(slots_->size());
  ratios_ = at::zeros({num_slots + 2 * chunks_.size(0)}, there.dtype(at::kDouble));
  arrivals_ = at::zeros({num_slots}, there.dtype(at::kInt));
}

void Plan::norm(const std::optional<at::Tensor>& partial_sums,
                const std::optional<GivenEnding>& ending) {
  const c10::DeviceGuard guard(slots_->device());
  const Stream stream = enter();
  SquaresLaunch launch{};
  launch.ending = as_ending(ending);
  launch.ticket = static_cast<uint32_t*>(ticket_.mutable_data_ptr());
  launch.stream = stream.handle;
  if (partial_sums) {
    if (partial_sums->numel() != num_sums())
      throw std::invalid_argument("partial_sums has " + std::to_string(partial_sums->numel()) +
                                  " elements; allowed: " + std::to_string(num_sums()));
    slots_->begin_gradients();
    pack(stream.capturing);
    launch.chunks = chunks_.const_data_ptr<int32_t>();
    launch.num_chunks = chunks_.size(0);
    launch.slots = slot_table_.const_data_ptr<int64_t>();
    launch.slot_size = slots_->slot_layout().size();
    launch.num_slots = static_cast<int>(slots_->size());
    launch.words = device_words();
    launch.host_words = words_.data();
    launch.grads_at = slots_->layout().grads();
    launch.partial_sums = partial_sums->mutable_data_ptr<double>();
  }
  squares_(launch);
}

// From begin() to the launch nothing else runs in Python. What is freed after it is used anew only
// behind the kernel: torch's allocator gives memory back in the order of its stream.
void Plan::run(const std::optional<at::Tensor>& control, const std::optional<std::string>& groups) {
  const c10::DeviceGuard guard(slots_->device());
  const Stream stream = enter();
  slots_->begin();
  pack(stream.capturing);
  const auto* how = (control ? *control : neutral_).const_data_ptr<double>();
  const double* scalars = folder_ ? folder_->run(groups.value(), *slots_, how, stream) : nullptr;
  Launch launch{};
  launch.chunks = chunks_.const_data_ptr<int32_t>();
  launch.num_chunks = chunks_.size(0);
  launch.slots = slot_table_.const_data_ptr<int64_t>();
  launch.num_slots = static_cast<int>(slots_->size());
  launch.num_rows = slots_->num_rows();
  launch.num_emas = slots_->num_emas();
  launch.row_size = slots_->row_layout().size();
  launch.ema_before = ema_before_;
  launch.scalars = scalars;
  launch.words = device_words();
  launch.host_words = words_.data();
  launch.num_words = slots_->layout().slots();
  launch.control = how;
  launch.device = slots_->device().index();
  launch.stream = stream.handle;
  if (trust_ != nullptr) {
    launch.ratios = ratios_.mutable_data_ptr<double>();
    launch.arrivals = static_cast<uint32_t*>(arrivals_.mutable_data_ptr());
    trust_(launch);
  }
  kernel_.kernel(launch);
  slots_->advance();
}

// The current stream. Where it is another one than before, what the plan keeps is read there, too:
// freed, it must not go back to the stream that it was made on while a kernel still reads it.
Stream Plan::enter() {
  const Stream stream = current_stream(slots_->device());
  if (std::exchange(stream_, stream.handle) != stream.handle) {
    for (const at::Tensor* kept :
         {&chunks_, &ticket_, &neutral_, &slot_table_, &changing_, &ratios_, &arrivals_})
      if (kept->defined()) record_reader(*kept);
    if (folder_) folder_->record_reader();
  }
  return stream;
}

// Packs what changes from step to step and uploads what must lie on the device: once a step, unless
// an address has changed since.
void Plan::pack(bool capturing) {
  if (std::exchange(packed_, true) && slots_->num_changed() == 0) return;
  const bool new_slots = !slot_table_.defined() || slots_->num_changed() > slots_->layout().slots();
  const int64_t changing = slots_->layout().slots();
  const int64_t count = new_slots ? slots_->num_words() : changing;
  words_.resize(slots_->num_words());
  slots_->pack(words_.data(), count);
  if (new_slots) slot_table_ = upload(&words_[changing], count - changing, capturing);
  if (!fits(changing)) changing_ = upload(words_.data(), changing, capturing);
  if (capturing) uploads_.keep(slot_table_);
}

// The changing words on the device, null where a launch passes them by value.
const int64_t* Plan::device_words() const {
  return fits(slots_->layout().slots()) ? nullptr : changing_.const_data_ptr<int64_t>();
}

at::Tensor Plan::upload(const int64_t* words, int64_t count, bool capturing) {
  return uploads_.upload(words, count, capturing, slots_->capturable() ? slots_->num_words() : 0);
}

}  // namespace fused_ema::cuda
