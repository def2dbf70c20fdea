// The kernels that add up squares of gradients.
#include "cuda/launch.cuh"
#include "cuda/squares.cuh"
#include "dispatch.h"

namespace fused_ema::cuda {

namespace {

template <class Stored, int num_words>
void launch_squares_sized(const SquaresLaunch& launch) {
  GradParameters<num_words> parameters;
  parameters.task = {launch.chunks,
                     launch.num_chunks,
                     launch.slots,
                     launch.slot_size,
                     launch.words != nullptr ? launch.words + launch.grads_at : nullptr,
                     launch.sums};
  if (launch.words == nullptr)
    std::memcpy(parameters.grads, launch.host_words + launch.grads_at,
                launch.num_slots * sizeof(int64_t));
  void* arguments[] = {&parameters};
  const auto blocks = static_cast<unsigned>(sums_of(launch.num_chunks) / threads);
  check(cudaLaunchKernel(squares<Stored, num_words>, dim3(blocks), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(launch.stream)),
        "to launch the squares kernel");
}

template <class Stored>
void launch_squares(const SquaresLaunch& launch) {
  if (launch.num_chunks == 0) return;
  constexpr int few = Parameters<small>::capacity;
  if (launch.words == nullptr && launch.num_slots > few)
    launch_squares_sized<Stored, Parameters<large>::capacity>(launch);
  else
    launch_squares_sized<Stored, few>(launch);
}

}  // namespace

int64_t sums_of(int64_t num_chunks) { return std::min(num_chunks, squares_blocks) * threads; }

Squares find_squares(StoredType stored) {
  Squares found = nullptr;
  with_stored_type(stored, [&](auto value) { found = launch_squares<decltype(value)>; });
  return found;
}

}  // namespace fused_ema::cuda
