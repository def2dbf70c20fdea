// The kernel that adds up the squares of gradients, before a step that clips their norm.
#pragma once

#include "cuda/step.cuh"
#include "cuda/sums.cuh"

namespace fused_ema::cuda {

// SquaresLaunch, as the kernel sees it; `grads` is null where they are in the parameters.
struct GradTask {
  const int32_t* chunks;
  int64_t num_chunks;
  const int64_t* slots;
  int64_t slot_size;
  const int64_t* grads;
  double* partial_sums;
  Ending ending;
  uint32_t* ticket;
};

template <int bytes>
struct GradParameters {
  static constexpr int capacity = (bytes - int{sizeof(GradTask)}) / int{sizeof(int64_t)};

  GradTask task;
  int64_t grads[capacity];
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

// The squares of a thread's elements: added up in float within a chunk (in double where that
// overflows), and in double over its chunks.
template <class Stored>
__device__ double thread_squares(const GradTask& task, const int64_t* grads) {
  constexpr int64_t elements = chunk_bytes / sizeof(Stored);
  double total = 0;
#pragma unroll 1
  for (int64_t index = task.num_chunks - 1 - blockIdx.x; index >= 0; index -= gridDim.x) {
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
  return total;
}

__device__ inline void end(const Ending& ending) {
  const double total = sum_of_all<1>(ending.sums, ending.num_sums);
  if (threadIdx.x == 0) decide(ending.treatment, total, ending.control);
}

template <class Stored, int bytes>
__global__ void __launch_bounds__(threads, min_blocks)
    squares(const __grid_constant__ GradParameters<bytes> parameters) {
  const GradTask& task = parameters.task;
  if (task.partial_sums != nullptr) {
    const int64_t* grads = task.grads != nullptr ? task.grads : parameters.grads;
    const double total = block_sum(thread_squares<Stored>(task, grads));
    if (threadIdx.x == 0) task.partial_sums[blockIdx.x] = total;
  }
  if (task.ending.control == nullptr || !is_last(task.ticket, gridDim.x)) return;
  if (threadIdx.x == 0) *task.ticket = 0;
  end(task.ending);
}

}  // namespace fused_ema::cuda
