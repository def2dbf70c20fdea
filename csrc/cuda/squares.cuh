// The kernel that adds up the squares of gradients, before a step that clips their norm.
#pragma once

#include "cuda/step.cuh"

namespace fused_ema::cuda {

// SquaresLaunch, as the kernel sees it; `grads` is null where they are in the parameters.
struct GradTask {
  const int32_t* chunks;
  int64_t num_chunks;
  const int64_t* slots;
  int slot_size;
  const int64_t* grads;
  double* sums;
};

template <int num_words>
struct GradParameters {
  GradTask task;
  int64_t grads[num_words];
};

template <class Value, class Stored>
__device__ Value chunk_squares(const Stored* grad, int count, bool aligned) {
  Value sum = 0;
  for_each_pack<access / int{sizeof(Stored)}>(count, aligned, [&](auto size, int at) {
    constexpr int n = decltype(size)::value;
    Pack<Stored, n> pack;
    pack.read(grad + at);
#pragma unroll
    for (int i = 0; i < n; ++i) sum += Value(load(pack.get(i))) * Value(load(pack.get(i)));
  });
  return sum;
}

// Each thread adds up what it meets, in float within a chunk (in double where that overflows) and
// in double over its chunks, and no thread waits for another: the rest of the sum is left to who
// launches this.
template <class Stored, int num_words>
__global__ void __launch_bounds__(threads, min_blocks)
    squares(const __grid_constant__ GradParameters<num_words> parameters) {
  const GradTask& task = parameters.task;
  const int64_t* grads = task.grads != nullptr ? task.grads : parameters.grads;
  constexpr int64_t elements = chunk_bytes / sizeof(Stored);
  double total = 0;
#pragma unroll 1
  for (int64_t index = blockIdx.x; index < task.num_chunks; index += gridDim.x) {
    const int64_t slot = task.chunks[2 * index];
    const int64_t begin = task.chunks[2 * index + 1] * elements;
    const int64_t left = task.slots[slot * task.slot_size] - begin;
    const int64_t address = grads[slot];
    if (address == 0) continue;
    const Stored* grad = reinterpret_cast<const Stored*>(address) + begin;
    const int count = static_cast<int>(left < elements ? left : elements);
    const bool aligned = address % access == 0;
    const auto sum = chunk_squares<Compute<Stored>>(grad, count, aligned);
    total += is_finite(sum) ? sum : chunk_squares<double>(grad, count, aligned);
  }
  task.sums[int64_t{blockIdx.x} * threads + threadIdx.x] = total;
}

}  // namespace fused_ema::cuda
