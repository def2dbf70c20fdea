// What a plan asks of the GPU to fold a step's scalars there, free of torch's and CUDA's headers.
#pragma once

#include <cstdint>
#include <string>

namespace fused_ema::cuda {

// Words of a group before its numbers, and of each of its averages; see FoldLaunch.
constexpr int group_head = 5;
// Bits beside the rule's flags: kappa drives the averages alone, or the optimizer alone.
constexpr int64_t ema_alone = int64_t{1} << 32, optimizer_alone = int64_t{1} << 33;
constexpr int decay_words = 4;

// One launch, which folds the scalars of every slot of a bucket and counts its steps.
//   host_words: a record for each group, then for each slot the address of its float64 count, plus
//               one where it has a gradient: then kappa is added to it
//   words:      a device copy of host_words, or null: then they travel by value, see fold_fits()
//   group_of:   device: which record is a slot's
//   control:    device, as a step's: nothing is folded or counted where nothing shall move
//   table:      device, [num_slots][rule's scalars, a weight per average and, where `rounds`, the
//               seed of the step]
//   arrivals:   device, one a group, 0 between launches
// The record of a group:
//   address of its float64 base steps; for how many slots to wait until kappa is added to them, 0
//   if that is not done here; flags, see rules.h; rounding_seed; the kinds of its numbers, 4 bits
//   each its numbers, as the rule names them its averages' decays, each a kind and three words:
//   numbers, or the fields of a schedule
// A number's kind says what its word is: the number itself, in double, or where one of that type
// lies.
enum class Kind : int64_t { itself, float64, float32, float16, bfloat16, int64, int32 };

struct FoldLaunch {
  const int64_t* words;
  const int64_t* host_words;
  int64_t num_words;
  const int32_t* group_of;
  int num_groups;
  int num_slots;
  int num_emas;
  bool rounds;
  const double* control;
  double* table;
  int32_t* arrivals;
  void* stream;
};

bool fold_fits(int64_t num_words);

// Throws std::runtime_error where CUDA refuses.
using Fold = void (*)(const FoldLaunch&);

struct FoldInfo {
  Fold launch = nullptr;
  int num_numbers = 0;

  int64_t group_size(int num_emas) const {
    return group_head + num_numbers + decay_words * num_emas;
  }
};

// The kernel of a rule; a null one where there is none.
FoldInfo find_fold(const std::string& rule);

}  // namespace fused_ema::cuda
