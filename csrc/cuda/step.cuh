// The kernel: what one block does to its chunks. The maths is in rules.h, the metadata in launch.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/chunk.cuh"

namespace fused_ema::cuda {

// How an average moves.
template <class T>
struct Motion {
  int k;  // which one
  T rate;
  bool before;  // it takes the weights before the step
};

template <class Chunk>
using MotionOf = Motion<Compute<typename Chunk::Weight>>;

// Two neighbours of a pack, or its one element.
template <int n>
constexpr int together = n > 1 ? 2 : 1;

// Whether values that are not finite are looked for once a pack.
template <class Chunk, int n>
constexpr bool looks_once = n > 1 && std::is_same_v<Compute<typename Chunk::Weight>, float>;

template <class Chunk, int n, class How>
__device__ void update(const Chunk& chunk, int at, Pack<typename Chunk::Weight, n>& param,
                       const Pack<typename Chunk::Param, n>& grad,
                       Pack<typename Chunk::State, n>* states, const ScalarsOf<Chunk>& scalars,
                       How& how) {
  using Value = Compute<typename Chunk::Weight>;
  constexpr int num_states = Chunk::num_states, m = together<n>;
  const Hashes hashes = chunk.hashes(at);
#pragma unroll
  for (int i = 0; i < n; i += m) {
    Value values[m], state_values[num_states + 1][m];
#pragma unroll
    for (int j = 0; j < m; ++j) {
      Value state[num_states + 1];
      values[j] = load(param.get(i + j));
#pragma unroll
      for (int k = 0; k < num_states; ++k) state[k] = load(states[k].get(i + j));
      Chunk::Rule::update(values[j], load(grad.get(i + j)), state, scalars.get(), how);
#pragma unroll
      for (int k = 0; k < num_states; ++k) state_values[k][j] = state[k];
    }
    param.keep(i, values);
#pragma unroll
    for (int k = 0; k < num_states; ++k) {
      if constexpr (Chunk::Layout::rounded_states)
        states[k].template keep<How>(i, state_values[k], hashes(first_state_key + k, i / 2), at);
      else
        states[k].keep(i, state_values[k]);
    }
  }
}

// What averages follow: n weights and, where they are differences, what those were before.
template <class Chunk, int n>
struct Target {
  Pack<typename Chunk::Weight, n> param;
  Pack<typename Chunk::Weight, n> old;
};

template <class Chunk, bool before, int n, class How>
__device__ auto moved_average(int i, const Pack<typename Chunk::Average, n>& average,
                              const Target<Chunk, n>& target, Compute<typename Chunk::Weight> rate,
                              How& how) {
  const auto held = load(average.get(i));
  const auto param = load(target.param.get(i));
  if constexpr (Chunk::format == EmaFormat::delta)
    return ema_delta<before>(held, load(target.old.get(i)), param, rate, how);
  else
    return ema(held, param, rate, how);
}

template <bool before, class Chunk, int n, class How>
__device__ Pack<typename Chunk::Average, n> moved_averages(
    const Chunk& chunk, int at, const MotionOf<Chunk>& motion,
    const Pack<typename Chunk::Average, n>& average, const Target<Chunk, n>& target, How& how) {
  constexpr int m = together<n>;
  const Hashes hashes = chunk.hashes(at);
  Pack<typename Chunk::Average, n> next;
#pragma unroll
  for (int i = 0; i < n; i += m) {
    Compute<typename Chunk::Weight> values[m];
#pragma unroll
    for (int j = 0; j < m; ++j)
      values[j] = moved_average<Chunk, before>(i + j, average, target, motion.rate, how);
    if constexpr (Chunk::format == EmaFormat::full)
      next.keep(i, values);
    else
      next.template keep<How>(i, values, hashes(motion.k, i / 2), at);
  }
  return next;
}

template <bool before, class Chunk, int n>
__device__ void follow(const Chunk& chunk, int at, const MotionOf<Chunk>& motion,
                       Pack<typename Chunk::Average, n>& average, const Target<Chunk, n>& target) {
  if constexpr (looks_once<Chunk, n> && !Chunk::scarce) {
    Quick quick;
    const auto next = moved_averages<before>(chunk, at, motion, average, target, quick);
    if (quick.right()) {
      average = next;
      return;
    }
  }
  constexpr Exact exact;
  MotionOf<Chunk> again = motion;
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(again.k));  // nor is the key of its bits kept
#endif
  average = moved_averages<before>(chunk, at, again, average, target, exact);
}

template <class Chunk, int n>
__device__ void follow(const Chunk& chunk, int at, const MotionOf<Chunk>& motion,
                       Pack<typename Chunk::Average, n>& average, const Target<Chunk, n>& target) {
  if (Chunk::format == EmaFormat::delta && motion.before)
    follow<true>(chunk, at, motion, average, target);
  else
    follow<false>(chunk, at, motion, average, target);
}

// Steps n neighbours, and moves their first average where `averaged`: all of them where they are
// differences, for which the old weights are gone after the step.
template <bool averaged, int n, class Chunk>
__device__ void step_pack(const Chunk& chunk, int at, const ScalarsOf<Chunk>& scalars,
                          const MotionOf<Chunk>& first) {
  using Param = typename Chunk::Param;
  using Weight = typename Chunk::Weight;
  using State = typename Chunk::State;
  using Average = typename Chunk::Average;
  constexpr int num_states = Chunk::num_states;
  constexpr bool differences = Chunk::differences;
  // More packs of 16 bytes would not leave enough registers for the arithmetic; double needs more,
  // and so do random bits.
  constexpr int packs = Chunk::rounds ? 3 : (sizeof(Compute<Weight>) == 8 ? 4 : 5);
  constexpr bool early = !differences && n * (sizeof(Param) + sizeof(Weight) +
                                              num_states * sizeof(State) + sizeof(Average)) <=
                                             packs * access;
  Pack<Param, n> grad;
  Pack<Weight, n> param;
  Pack<State, n> states[num_states + 1];
  Pack<Average, n> average;

  const auto read = [&] {
    param.read(chunk.param() + at);
    grad.read(chunk.grad + at);
#pragma unroll
    for (int k = 0; k < num_states; ++k) states[k].read(chunk.state(k) + at);
  };
  read();
  if constexpr (averaged && early) average.read(chunk.average(0) + at);
  if constexpr (averaged && !early) prefetch(chunk.average(0) + at);
  const auto move_average = [&](const MotionOf<Chunk>& motion, const Target<Chunk, n>& target) {
    if constexpr (!early) average.read(chunk.average(motion.k) + at);
    follow(chunk, at, motion, average, target);
    average.write(chunk.average(motion.k) + at);
  };
  const auto write_param = [&] {
    param.write(chunk.param() + at);
    if constexpr (Chunk::Layout::has_master) {
      Pack<Param, n> copy;
#pragma unroll
      for (int i = 0; i < n; i += together<n>) {
        const Weight values[] = {param.get(i), param.get(i + together<n> - 1)};
        copy.keep(i, values);
      }
      copy.write(chunk.copy() + at);
    }
  };

  if constexpr (averaged && !differences)
    if (first.before) move_average(first, Target<Chunk, n>{param, {}});
  bool done = false;
  if constexpr (looks_once<Chunk, n>) {
    Quick quick;
    update(chunk, at, param, grad, states, scalars, quick);
    done = quick.right();
    if (!done) read();
  }
  constexpr Exact exact;
  if (!done) update(chunk, at, param, grad, states, scalars, exact);
#pragma unroll
  for (int k = 0; k < num_states; ++k) states[k].write(chunk.state(k) + at);
  if constexpr (averaged && differences) {
    // read again: kept, the old weights would take the registers of the rule
    Target<Chunk, n> target{param, {}};
    target.old.read(chunk.param() + at);
    write_param();
    MotionOf<Chunk> motion = first;
#pragma unroll 1
    while (true) {
      move_average(motion, target);
      if (++motion.k >= chunk.num_emas) break;
      motion.rate = chunk.ema_rate(motion.k);
    }
  } else {
    write_param();
    // the new parameter as it is in memory: rounded
    if constexpr (averaged)
      if (!first.before) move_average(first, Target<Chunk, n>{param, {}});
  }
}

// Calls visit with every pack of a chunk that is this thread's: how many elements (a constant), and
// where. Whole packs where all tensors are aligned to them, single elements elsewhere.
template <int width, class Visit>
__device__ void for_each_pack(int count, bool aligned, Visit visit) {
  const int thread = static_cast<int>(threadIdx.x);
  const int wide = aligned ? count / width * width : 0;
#pragma unroll unroll
  for (int at = thread * width; at < wide; at += threads * width)
    visit(std::integral_constant<int, width>{}, at);
#pragma unroll 1
  for (int at = wide + thread; at < count; at += threads)
    visit(std::integral_constant<int, 1>{}, at);
}

template <bool averaged, class Chunk>
__device__ void step_chunk(const Chunk& chunk, const double* control, bool ema_before) {
  const ScalarsOf<Chunk> scalars(chunk.row, control, chunk.ratio);
  const MotionOf<Chunk> first{0, averaged ? chunk.ema_rate(0) : 0, ema_before};
  for_each_pack<Chunk::width>(chunk.count, chunk.aligned, [&](auto size, int at) {
    step_pack<averaged, decltype(size)::value>(chunk, at, scalars, first);
  });
}

// Moves average k of a chunk, nothing else.
template <class Chunk>
__device__ void follow_chunk(const Chunk& chunk, int k, bool ema_before) {
  using Weight = typename Chunk::Weight;
  const MotionOf<Chunk> motion{k, chunk.ema_rate(k), ema_before};
  for_each_pack<Chunk::width>(chunk.count, chunk.aligned, [&](auto size, int at) {
    constexpr int n = decltype(size)::value;
    Pack<Weight, n> param;
    Pack<typename Chunk::Average, n> average;
    param.read(chunk.param() + at);
    average.read(chunk.average(k) + at);
    follow(chunk, at, motion, average, Target<Chunk, n>{param, param});
    average.write(chunk.average(k) + at);
  });
}

// Where the grid is persistent it fills the GPU, and blocks go from chunk to chunk. In every pass
// over a chunk a thread meets the same elements, so that no thread ever waits for another.
template <class Rule, class Layout, EmaFormat format, int bytes>
__global__ void __launch_bounds__(threads, min_blocks)
    step(const __grid_constant__ Parameters<bytes> parameters) {
  const Task& task = parameters.task;
  if (task.control[1] != 0) return;
  const int64_t* words = task.words != nullptr ? task.words : parameters.words;
  // The pass of average 0 runs the rule too; it is the last where averages take the old parameter.
  const int passes = task.num_emas > 1 ? task.num_emas : 1;
#pragma unroll 1
  for (int64_t index = blockIdx.x; index < task.num_chunks; index += gridDim.x) {
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      const Chunk<Rule, Layout, format> chunk(task, words, index);
      const bool steps = chunk.grad != nullptr;
      const int k = task.ema_before ? passes - 1 - pass : pass;
      if (k == 0 && steps && task.num_emas > 0)
        step_chunk<true>(chunk, task.control, task.ema_before);
      else if (k == 0 && steps)
        step_chunk<false>(chunk, task.control, false);
      else if (k < task.num_emas && !(steps && format == EmaFormat::delta))
        follow_chunk(chunk, k, task.ema_before);
    }
  }
}

}  // namespace fused_ema::cuda
