// The kernel: what one block does to its chunks. The maths is in rules.h, the metadata in launch.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "dispatch.h"
#include "layout.h"
#include "rules.h"

namespace fused_ema::cuda {

// Launch, as the kernel sees it; `words` is null where they are in the parameters.
struct Task {
  const int32_t* chunks;
  int64_t num_chunks;
  const int64_t* slots;
  const double* scalars;
  const int64_t* words;
  const double* control;
  int num_slots;
  int num_rows;
  int num_emas;
  bool ema_before;
};

template <int bytes>
struct Parameters {
  static constexpr int capacity = (bytes - int{sizeof(Task)}) / int{sizeof(int64_t)};

  Task task;
  int64_t words[capacity];
};

// A slot's row: four indices lie in a word, the lowest bits first.
__device__ inline int row_index(const int64_t* indices, int64_t slot) {
  constexpr int64_t each = WordLayout::indices_per_word;
  return indices[slot / each] >> (slot % each * 16) & 0xffff;
}

// A chunk of a slot: where its tensors are, and its row of the scalar table.
template <class RuleOf, class LayoutOf, EmaFormat format_of>
struct Chunk {
  using Rule = RuleOf;
  using Layout = LayoutOf;
  using Param = typename Layout::Param;
  using Weight = typename Layout::Weight;
  using State = typename Layout::State;
  using Average = StoredAverage<format_of, Compute<Weight>>;
  static constexpr EmaFormat format = format_of;
  static constexpr bool rounds = Layout::rounded_states || format != EmaFormat::full;
  static constexpr int num_states = Rule::num_states;
  static constexpr int num_scalars = Rule::scalars.size();
  static constexpr SlotLayout slot_layout{Layout::has_master, num_states, 0};
  static constexpr int first_state = slot_layout.first_state();
  static constexpr int first_average = slot_layout.first_average();
  static constexpr int64_t elements = chunk_bytes / sizeof(Param);
  // What a thread takes at a time: the widest access, but with three states random bits need the
  // registers of half of it.
  static constexpr int width = access / sizeof(Weight) / (rounds && num_states > 2 ? 2 : 1);

  const int64_t* tensors;
  const Param* grad;  // null: the rule does not run
  const double* row;
  int64_t begin;
  int count;
  int num_emas;
  bool aligned;      // to the widest access, all tensors
  uint32_t key = 0;  // of random bits

  __device__ Chunk(const Task& task, const int64_t* words, int64_t index) {
    const int64_t slot = task.chunks[2 * index];
    const int last = first_average + task.num_emas;
    begin = task.chunks[2 * index + 1] * elements;
    tensors = task.slots + slot * last;
    const int64_t left = tensors[SlotLayout::numel] - begin;
    count = static_cast<int>(left < elements ? left : elements);
    num_emas = task.num_emas;

    const RowLayout of_row{num_scalars, task.num_emas, rounds};
    const bool in_words = task.scalars == nullptr;
    const double* table = in_words ? reinterpret_cast<const double*>(words) : task.scalars;
    const WordLayout of_words{in_words ? int64_t{task.num_rows} * of_row.size() : 0,
                              task.num_slots};
    row = table + row_index(words + of_words.indices(), slot) * of_row.size();
    const int64_t grad_address = words[of_words.grads() + slot];
    grad = grad_address != 0 ? reinterpret_cast<const Param*>(grad_address) + begin : nullptr;

    // a chunk begins at a multiple of the widest access, so that the tensors' addresses decide
    int64_t low_bits = grad_address;
#pragma unroll
    for (int k = SlotLayout::param; k < first_average; ++k) low_bits |= tensors[k];
#pragma unroll 1
    for (int k = first_average; k < last; ++k) low_bits |= tensors[k];
    aligned = low_bits % access == 0;

    if constexpr (rounds) {
      const auto seed = static_cast<uint32_t>(row[of_row.seed()]);
      key = parameter_key(seed, static_cast<uint32_t>(tensors[SlotLayout::param_index]));
    }
  }

  // Addresses are looked up (in the L1 cache) for each access: kept, each would take two registers.
  __device__ Param* copy() const { return at<Param>(SlotLayout::param); }
  __device__ Weight* param() const { return at<Weight>(slot_layout.weight()); }
  __device__ State* state(int k) const { return at<State>(first_state + k); }
  __device__ Average* average(int k) const { return at<Average>(first_average + k); }
  __device__ Compute<Weight> weight(int k) const {
    return static_cast<Compute<Weight>>(row[num_scalars + k]);
  }

  // Of the elements from `at` on: for average `which`, or for a state. Made anew for each of them:
  // kept, those of several tensors would take the registers of a pack.
  __device__ RandomBits bits(uint32_t which, int at) const {
    uint32_t own = key;
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(own));
#endif
    return {own, which, begin, static_cast<uint32_t>(at)};
  }

 private:
  template <class T>
  __device__ T* at(int tensor) const {
    return reinterpret_cast<T*>(tensors[tensor]) + begin;
  }
};

// The rule's scalars, as its arithmetic takes them.
template <class Rule, class T>
class RuleScalars {
 public:
  using Scalars = typename Rule::template Scalars<T>;

  __device__ RuleScalars(const double* row, const double* control) : scalars_(row, control[0]) {}
  __device__ const Scalars& get() const { return scalars_; }

 private:
  Scalars scalars_;
};

// Doubles take two registers each, more than there are, and are read (from the L1 cache) for each
// element. The compiler is told that memory may have changed, or it would keep them after all.
template <class Rule>
class RuleScalars<Rule, double> {
 public:
  using Scalars = typename Rule::template Scalars<double>;

  __device__ RuleScalars(const double* row, const double* control) : row_(row), control_(control) {}
  __device__ Scalars get() const {
    asm volatile("" ::: "memory");
    return Scalars(row_, control_[0]);
  }

 private:
  const double* row_;
  const double* control_;
};

template <class Chunk>
using ScalarsOf = RuleScalars<typename Chunk::Rule, Compute<typename Chunk::Weight>>;

// How an average moves.
template <class T>
struct Motion {
  int k;  // which one
  T weight;
  bool before;  // it takes the weights before the step
};

template <class Chunk>
using MotionOf = Motion<Compute<typename Chunk::Weight>>;

template <class Chunk, int n>
__device__ void update(const Chunk& chunk, int at, Pack<typename Chunk::Weight, n>& param,
                       const Pack<typename Chunk::Param, n>& grad,
                       Pack<typename Chunk::State, n>* states, const ScalarsOf<Chunk>& scalars) {
  using Value = Compute<typename Chunk::Weight>;
  constexpr int num_states = Chunk::num_states;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    Value value = load(param.get(i));
    Value state[num_states + 1];
#pragma unroll
    for (int k = 0; k < num_states; ++k) state[k] = load(states[k].get(i));
    Chunk::Rule::update(value, load(grad.get(i)), state, scalars.get());
    param.set(i, store<typename Chunk::Weight>(value));
#pragma unroll
    for (int k = 0; k < num_states; ++k) {
      if constexpr (Chunk::Layout::rounded_states)
        states[k].set(i, round_bfloat16(state[k], chunk.bits(first_state_key + k, at)[i]));
      else
        states[k].set(i, store<typename Chunk::State>(state[k]));
    }
  }
}

// What averages follow: n weights or, where they are differences, how far those have moved.
template <class Chunk, int n>
struct Target {
  Compute<typename Chunk::Weight> values[n] = {};

  __device__ explicit Target(const Pack<typename Chunk::Weight, n>& param) {
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = load(param.get(i));
  }
  __device__ Target(const Pack<typename Chunk::Weight, n>& param,
                    const Pack<typename Chunk::Weight, n>& old) {
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = moved(load(old.get(i)), load(param.get(i)));
  }
};

template <class Chunk, int n>
__device__ void follow(const Chunk& chunk, int at, const MotionOf<Chunk>& motion,
                       Pack<typename Chunk::Average, n>& average, const Target<Chunk, n>& target) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const auto old = average.get(i);
    const auto value = target.values[i];
    if constexpr (Chunk::format == EmaFormat::full) {
      average.set(i, ema(old, value, motion.weight));
    } else {
      const uint32_t bits = chunk.bits(motion.k, at)[i];
      if constexpr (Chunk::format == EmaFormat::bf16)
        average.set(i, rounded_ema(old, value, motion.weight, bits));
      else
        average.set(i, motion.before ? rounded_ema_delta<true>(old, value, motion.weight, bits)
                                     : rounded_ema_delta<false>(old, value, motion.weight, bits));
    }
  }
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
  constexpr bool differences = Chunk::format == EmaFormat::delta;
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

  param.read(chunk.param() + at);
  grad.read(chunk.grad + at);
#pragma unroll
  for (int k = 0; k < num_states; ++k) states[k].read(chunk.state(k) + at);
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
      for (int i = 0; i < n; ++i) copy.set(i, store<Param>(param.get(i)));
      copy.write(chunk.copy() + at);
    }
  };

  if constexpr (averaged && !differences)
    if (first.before) move_average(first, Target<Chunk, n>(param));
  update(chunk, at, param, grad, states, scalars);
#pragma unroll
  for (int k = 0; k < num_states; ++k) states[k].write(chunk.state(k) + at);
  if constexpr (averaged && differences) {
    // read again: kept, the old weights would take the registers of the rule
    Pack<Weight, n> old;
    old.read(chunk.param() + at);
    const Target<Chunk, n> target(param, old);
    write_param();
#pragma unroll 1
    for (int k = 0; k < chunk.num_emas; ++k)
      move_average({k, chunk.weight(k), first.before}, target);
  } else {
    write_param();
    // the new parameter as it is in memory: rounded
    if constexpr (averaged)
      if (!first.before) move_average(first, Target<Chunk, n>(param));
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
  const ScalarsOf<Chunk> scalars(chunk.row, control);
  const MotionOf<Chunk> first{0, averaged ? chunk.weight(0) : 0, ema_before};
  for_each_pack<Chunk::width>(chunk.count, chunk.aligned, [&](auto size, int at) {
    step_pack<averaged, decltype(size)::value>(chunk, at, scalars, first);
  });
}

// Moves average k of a chunk, nothing else.
template <class Chunk>
__device__ void follow_chunk(const Chunk& chunk, int k, bool ema_before) {
  using Weight = typename Chunk::Weight;
  const MotionOf<Chunk> motion{k, chunk.weight(k), ema_before};
  for_each_pack<Chunk::width>(chunk.count, chunk.aligned, [&](auto size, int at) {
    constexpr int n = decltype(size)::value;
    Pack<Weight, n> param;
    Pack<typename Chunk::Average, n> average;
    param.read(chunk.param() + at);
    average.read(chunk.average(k) + at);
    constexpr bool differences = Chunk::format == EmaFormat::delta;
    follow(chunk, at, motion, average,
           differences ? Target<Chunk, n>(param, param) : Target<Chunk, n>(param));
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
