// The kernel that takes trust ratios, before a step that multiplies by them.
#pragma once

#include "cuda/step.cuh"
#include "cuda/sums.cuh"

namespace fused_ema::cuda {

struct Norms {
  double weights = 0;  // a sum of squares each
  double steps = 0;
};

// Over a thread's elements of a chunk. In double, so that hardly a bit of a ratio depends on the
// order.
template <class Chunk>
__device__ Norms thread_norms(const Chunk& chunk, const double* control) {
  using Value = Compute<typename Chunk::Weight>;
  constexpr int num_states = Chunk::Rule::num_measured;
  const double* one = chunk.row + Chunk::num_scalars - 1;  // the row of a group that adapts
  const ScalarsOf<Chunk> scalars(chunk.row, control, one);
  Norms norms;
  for_each_pack<Chunk::width>(chunk.count, chunk.aligned, [&](auto size, int at) {
    constexpr int n = decltype(size)::value;
    Pack<typename Chunk::Weight, n> param;
    Pack<typename Chunk::Param, n> grad;
    Pack<typename Chunk::State, n> states[num_states + 1];
    param.read(chunk.param() + at);
    grad.read(chunk.grad + at);
#pragma unroll
    for (int k = 0; k < num_states; ++k) states[k].read(chunk.state(k) + at);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      Value state[num_states + 1] = {};
#pragma unroll
      for (int k = 0; k < num_states; ++k) state[k] = load(states[k].get(i));
      const Value value = load(param.get(i));
      const double step =
          Chunk::Rule::measured(value, Value(load(grad.get(i))), state, scalars.get());
      norms.weights += double{value} * double{value};
      norms.steps += step * step;
    }
  });
  return norms;
}

// Sums a chunk; whoever sums the last chunk of a slot makes its ratio of all of its sums.
template <class Chunk>
__device__ void measure_chunk(const Chunk& chunk, const Task& task, int64_t index) {
  const int64_t slot = task.chunks[2 * index], first = index - task.chunks[2 * index + 1];
  const bool adapts = chunk.row[Chunk::num_scalars - 1] != 0;
  double* const ratio = task.ratios + slot;
  if (!adapts) {
    if (threadIdx.x == 0 && index == first) *ratio = 1;
    return;
  }
  const Norms norms = thread_norms(chunk, task.control);
  double* const sums = task.ratios + task.num_slots;
  const double weights = block_sum(norms.weights), steps = block_sum(norms.steps);
  if (threadIdx.x == 0) {
    sums[2 * index] = weights;
    sums[2 * index + 1] = steps;
  }
  const int64_t numel = chunk.tensors[SlotLayout::numel];
  const int64_t count = (numel + Chunk::elements - 1) / Chunk::elements;
  if (!is_last(task.arrivals + slot, static_cast<uint32_t>(count))) return;
  const double all_weights = sum_of_all<2>(sums + 2 * first, count);
  const double all_steps = sum_of_all<2>(sums + 2 * first + 1, count);
  if (threadIdx.x != 0) return;
  task.arrivals[slot] = 0;
  *ratio = trust_of<typename Chunk::Rule>(all_weights, all_steps, chunk.row);
}

// From the last chunk to the first: the step, which goes the other way, finds in the L2 cache what
// has been read last.
template <class Rule, class Layout, int bytes>
__global__ void __launch_bounds__(threads, min_blocks)
    trust(const __grid_constant__ Parameters<bytes> parameters) {
  const Task& task = parameters.task;
  if (task.control[1] != 0) return;
  const int64_t* words = task.words != nullptr ? task.words : parameters.words;
#pragma unroll 1
  for (int64_t index = task.num_chunks - 1 - blockIdx.x; index >= 0; index -= gridDim.x) {
    const Chunk<Rule, Layout, EmaFormat::full> chunk(task, words, index);
    if (chunk.grad != nullptr) measure_chunk(chunk, task, index);
  }
}

}  // namespace fused_ema::cuda
