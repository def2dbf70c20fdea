// What a plan asks of the CPU loops, free of torch's headers.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "rounding.h"

namespace fused_ema {

enum class StoredType { float32, float64, bfloat16, float16 };

// How a parameter and what belongs to it are stored. The type is that of parameter and gradient;
// with a master, the parameter is a copy of weights in the arithmetic's type. The rule's states are
// as the weights, or in bfloat16 where they are rounded.
struct Storage {
  StoredType type;
  bool master = false;
  bool rounded_states = false;
  EmaFormat ema_format = EmaFormat::full;

  // Whether a step takes random bits.
  bool rounds() const { return rounded_states || ema_format != EmaFormat::full; }
};

// Elements [begin, end) of one parameter.
//   pointers: param, its master if there is one, the rule's states, the averages
//   grad: null where the averages alone move
//   row: the rule's scalars, then a weight per average
//   grad_factor: what gradients are multiplied by
//   key: of the random bits, where something is rounded by them
//   ratio: the parameter's trust ratio, of a rule that takes norms
struct Piece {
  void* const* pointers;
  const void* grad;
  int64_t begin;
  int64_t end;
  const double* row;
  double grad_factor;
  int num_emas;
  bool ema_before;
  EmaFormat ema_format;
  uint32_t key;
  double ratio = 1;
};

using Kernel = void (*)(const Piece&);

// Of a piece that has not been stepped yet, the sums of squares of the weights and of what steps
// them, in this order.
using Measure = void (*)(const Piece&, double* sums);

// The trust ratio of a parameter with such sums, and whose row of scalars this is.
using Ratio = double (*)(const double* sums, const double* row);

// The sum of the squares of elements [begin, end) of a gradient.
using Squares = double (*)(const void* grad, int64_t begin, int64_t end);

struct KernelInfo {
  Kernel kernel = nullptr;
  int num_scalars = 0;
  Measure measure = nullptr;  // of a rule that takes norms
  Ratio ratio = nullptr;
};

// Which rule of rules.h: its name and variant, and how many states a bucket holds for it.
struct RuleId {
  std::string name;
  std::string variant;
  int num_states;
};

// A kernel that was looked up. Throws std::invalid_argument where there is none.
template <class Info>
Info known(const Info& found, const RuleId& rule, int num_scalars) {
  if (found.kernel == nullptr || found.num_scalars != num_scalars)
    throw std::invalid_argument("no kernel for rule " + rule.name + ", variant " + rule.variant +
                                ", with " + std::to_string(num_scalars) + " scalars");
  return found;
}

namespace cpu {

// CPU loops that this build has and this processor can run, the preferred one first.
std::vector<std::string> targets();

// The loop to use: FUSED_EMA_CPU where it is set, else the preferred one.
// Throws std::invalid_argument where it names none of targets().
std::string chosen_target();

// The loop for a rule; a null kernel where there is none.
// Throws std::invalid_argument where the rule keeps another number of states.
KernelInfo find_kernel(const std::string& target, const RuleId& rule, Storage storage);
Squares find_squares(const std::string& target, StoredType stored);

}  // namespace cpu
}  // namespace fused_ema
