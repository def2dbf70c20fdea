// The kernels that add up squares of gradients.
#include "cuda/launch.cuh"
#include "cuda/squares.cuh"
#include "dispatch.h"

namespace fused_ema::cuda {

namespace {

template <class Stored, int bytes>
void launch_squares_sized(const SquaresLaunch& launch) {
  GradParameters<bytes> parameters;
  parameters.task = {launch.chunks,
                     launch.num_chunks,
                     launch.slots,
                     launch.slot_size,
                     launch.words != nullptr ? launch.words + launch.grads_at : nullptr,
                     launch.partial_sums,
                     launch.ending,
                     launch.ticket};
  if (launch.partial_sums != nullptr && launch.words == nullptr)
    std::memcpy(parameters.grads, launch.host_words + launch.grads_at,
                launch.num_slots * sizeof(int64_t));
  void* arguments[] = {&parameters};
  const int64_t blocks = launch.partial_sums != nullptr ? num_sums(launch.num_chunks) : 1;
  check(cudaLaunchKernel(squares<Stored, bytes>, dim3(static_cast<unsigned>(blocks)), dim3(threads),
                         arguments, 0, static_cast<cudaStream_t>(launch.stream)),
        "to launch the squares kernel");
}

template <class Stored>
void launch_squares(const SquaresLaunch& launch) {
  const bool by_value = launch.partial_sums != nullptr && launch.words == nullptr;
  if (by_value && launch.num_slots > GradParameters<small>::capacity)
    launch_squares_sized<Stored, large>(launch);
  else
    launch_squares_sized<Stored, small>(launch);
}

}  // namespace

int64_t num_sums(int64_t num_chunks) { return std::clamp<int64_t>(num_chunks, 1, squares_blocks); }

Squares find_squares(StoredType stored) {
  Squares found = nullptr;
  with_stored_type(stored, [&](auto value) { found = launch_squares<decltype(value)>; });
  return found;
}

}  // namespace fused_ema::cuda
