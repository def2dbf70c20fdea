// What a block reads of the launch: a chunk of a slot, and the scalars of its row.
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
  double* ratios;
  uint32_t* arrivals;
  int num_slots;
  int num_rows;
  int num_emas;
  int row_size;
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

// Hashes of a pack that begins at an even index, or of the pair that a single element is in. What
// all of its tensors share is made once.
class Hashes {
 public:
  __device__ Hashes(uint32_t key, uint32_t first) {
#if defined(__CUDA_ARCH__)
    // made anew for what is done once more: kept, hashes would take the registers of a pack
    asm volatile("" : "+r"(key));
#endif
    shared_ = xor_halves(key ^ (first >> 1));
  }

  // The hash of the elements 2*pair and 2*pair + 1 of average `which`, or of a state.
  __device__ uint32_t operator()(uint32_t which, uint32_t pair) const {
    return mix_xored(shared_ ^ xor_halves(stream_key(which) ^ pair));
  }

 private:
  uint32_t shared_;
};

#if defined(__CUDA_ARCH__)
constexpr int architecture = __CUDA_ARCH__;
#else
constexpr int architecture = 0;
#endif

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
  static constexpr bool differences = format == EmaFormat::delta;
  // For sm_100 and later the compiler takes more registers, so that there are too few for eight
  // differences at a time, or for four with three states, or to look at eight averages once.
  static constexpr bool scarce = architecture >= 1000 && (sizeof(Weight) == 2 || num_states > 2);
  // What a thread takes at a time: the widest access.
  static constexpr int width = access / sizeof(Weight) / (scarce && differences ? 2 : 1);

  const int64_t* tensors;
  const Param* grad;  // null: the rule does not run
  const double* row;
  const double* ratio = nullptr;  // of a rule that takes norms
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
    const WordLayout of_words{in_words ? int64_t{task.num_rows} * task.row_size : 0,
                              task.num_slots};
    row = table + row_index(words + of_words.indices(), slot) * task.row_size;
    if constexpr (takes_norms<Rule>) ratio = task.ratios + slot;
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
      key = parameter_key(seed, static_cast<uint32_t>(tensors[SlotLayout::param_index])) ^
            upper_key(begin);
    }
  }

  // Addresses are looked up (in the L1 cache) for each access: kept, each would take two registers.
  __device__ Param* copy() const { return at<Param>(SlotLayout::param); }
  __device__ Weight* param() const { return at<Weight>(slot_layout.weight()); }
  __device__ State* state(int k) const { return at<State>(first_state + k); }
  __device__ Average* average(int k) const { return at<Average>(first_average + k); }
  __device__ Compute<Weight> ema_rate(int k) const {
    return static_cast<Compute<Weight>>(row[num_scalars + k]);
  }

  __device__ Hashes hashes(int at) const { return {key, static_cast<uint32_t>(begin) + at}; }

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

  __device__ RuleScalars(const double* row, const double* control, const double* ratio)
      : scalars_(scalars_of<Rule, T>(row, control[0], takes_norms<Rule> ? *ratio : 1)) {}
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

  __device__ RuleScalars(const double* row, const double* control, const double* ratio)
      : row_(row), control_(control), ratio_(ratio) {}
  __device__ Scalars get() const {
    asm volatile("" ::: "memory");
    return scalars_of<Rule, double>(row_, control_[0], takes_norms<Rule> ? *ratio_ : 1);
  }

 private:
  const double* row_;
  const double* control_;
  const double* ratio_;
};

template <class Chunk>
using ScalarsOf = RuleScalars<typename Chunk::Rule, Compute<typename Chunk::Weight>>;

}  // namespace fused_ema::cuda
