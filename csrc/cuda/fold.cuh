// The kernel that folds scalars in double: a thread a slot. The maths is in rules.h and
// schedules.h.
#pragma once

#include <cstring>

#include "cuda/fold.h"
#include "rounding.h"
#include "rules.h"
#include "schedules.h"

namespace fused_ema::cuda {

// Few, so that slots spread over multiprocessors: a thread's arithmetic is one long chain.
constexpr int fold_threads = 64;

// FoldLaunch, as the kernel sees it; `words` is null where they are in the parameters.
struct FoldTask {
  const int64_t* words;
  const int32_t* group_of;
  const double* control;
  double* table;
  int32_t* arrivals;
  int num_groups;
  int num_slots;
  int num_emas;
  bool rounds;
};

template <int bytes>
struct FoldParameters {
  static constexpr int capacity = (bytes - int{sizeof(FoldTask)}) / int{sizeof(int64_t)};

  FoldTask task;
  int64_t words[capacity];
};

FUSED_EMA_INLINE double as_double(int64_t word) {
  double value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
__device__ T* at_address(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// The number that a word stands for.
__device__ inline double number(Kind kind, int64_t word) {
  switch (kind) {
    case Kind::float64:
      return *at_address<const double>(word);
    case Kind::float32:
      return *at_address<const float>(word);
    case Kind::float16:
      return load(*at_address<const Half>(word));
    case Kind::bfloat16:
      return load(*at_address<const BFloat16>(word));
    case Kind::int64:
      return static_cast<double>(*at_address<const int64_t>(word));
    case Kind::int32:
      return *at_address<const int32_t>(word);
    default:
      return as_double(word);
  }
}

// The EMA rate of an average, from the words of its decay.
__device__ inline double ema_rate(const int64_t* decay, double base_steps, double kappa) {
  const int64_t kind = decay[0];
  if (kind < static_cast<int64_t>(Schedule::cosine))
    return decay_weight(number(static_cast<Kind>(kind), decay[1]), kappa);
  const double fields[3] = {as_double(decay[1]), as_double(decay[2]), as_double(decay[3])};
  return decay_weight(decay_at(static_cast<Schedule>(kind), fields, base_steps, kappa), kappa);
}

// The seed of the random bits of a step that begins at base_steps.
FUSED_EMA_INLINE uint32_t step_seed(uint32_t seed, double base_steps) {
  uint64_t bits;
  std::memcpy(&bits, &base_steps, sizeof bits);
  return mix(mix(seed ^ static_cast<uint32_t>(bits)) ^ static_cast<uint32_t>(bits >> 32));
}

// Adds kappa to a group's base steps when all of its slots have read them: the last to come does.
__device__ inline void arrive(int32_t* arrivals, int64_t slots, double* base_steps, double kappa) {
  __threadfence();
  if (atomicAdd(arrivals, 1) + 1 < slots) return;
  *base_steps += kappa;
  *arrivals = 0;
}

template <class Rule>
struct Counts {
  static constexpr int numbers = Rule::numbers.size();
  static constexpr int scalars = Rule::scalars.size();
};

template <class Rule>
__device__ void fold_slot(const FoldTask& task, const int64_t* words, int slot) {
  constexpr int count = Counts<Rule>::numbers, num_scalars = Counts<Rule>::scalars;
  const int64_t group_size = group_head + count + decay_words * task.num_emas;
  const int64_t group = task.group_of[slot], counter = words[task.num_groups * group_size + slot];
  const int64_t* record = words + group * group_size;
  double numbers[count];
#pragma unroll
  for (int k = 0; k < count; ++k)
    numbers[k] = number(static_cast<Kind>(record[4] >> (4 * k) & 15), record[group_head + k]);
  // What kappa does not drive goes on as at the base batch size.
  const double kappa = numbers[count - 1];
  const double ema_kappa = (record[2] & optimizer_alone) != 0 ? 1.0 : kappa;
  const double advance = numbers[count - 1] = (record[2] & ema_alone) != 0 ? 1.0 : kappa;
  double* const base_steps = at_address<double>(record[0]);
  const double before = *base_steps;

  double* const steps = at_address<double>(counter & ~int64_t{1});
  double step = *steps;
  if ((counter & 1) != 0) *steps = step += advance;

  double* const row = task.table + slot * (num_scalars + task.num_emas + task.rounds);
  const auto scalars = Rule::fold(numbers, Flags(record[2]), step);
  if constexpr (num_scalars > 0)
    *reinterpret_cast<std::remove_const_t<decltype(scalars)>*>(row) = scalars;
  const int64_t* decay = record + group_head + count;
#pragma unroll 1
  for (int k = 0; k < task.num_emas; ++k, decay += decay_words)
    row[num_scalars + k] = ema_rate(decay, before, ema_kappa);
  if (task.rounds)
    row[num_scalars + task.num_emas] = step_seed(static_cast<uint32_t>(record[3]), before);
  if (record[1] > 0) arrive(task.arrivals + group, record[1], base_steps, kappa);
}

template <class Rule, int bytes>
__global__ void __launch_bounds__(fold_threads)
    fold(const __grid_constant__ FoldParameters<bytes> parameters) {
  const FoldTask& task = parameters.task;
  const int slot = static_cast<int>(blockIdx.x * fold_threads + threadIdx.x);
  if (slot >= task.num_slots || task.control[1] != 0) return;
  fold_slot<Rule>(task, task.words != nullptr ? task.words : parameters.words, slot);
}

}  // namespace fused_ema::cuda
