// How the words lie that device kernels read about a bucket: computed here and nowhere else in C++.
// fused_ema/step/layout.py has the same for Python.
#pragma once

#include <cstdint>

namespace fused_ema {

// A slot: its number of elements, which of the optimizer's parameters it is, then addresses: the
// parameter, its master if there is one, the rule's states, the averages.
struct SlotLayout {
  static constexpr int numel = 0;
  static constexpr int param_index = 1;
  static constexpr int param = 2;

  bool master;
  int num_states;  // the rule's
  int num_emas;

  // What the rule steps: the master, or the parameter itself.
  constexpr int weight() const { return param + master; }
  constexpr int first_state() const { return weight() + 1; }
  constexpr int first_average() const { return first_state() + num_states; }
  constexpr int size() const { return first_average() + num_emas; }
};

// A row of doubles: the rule's scalars, a weight per average and, where something is rounded by
// random bits, the seed of the step.
struct RowLayout {
  int num_scalars;
  int num_emas;
  bool rounds;

  constexpr int first_ema_rate() const { return num_scalars; }
  constexpr int seed() const { return num_scalars + num_emas; }
  constexpr int size() const { return seed() + rounds; }
};

// All words of a bucket, those first that change most often: the rows, unless they are folded on
// the device; each slot's row, four 16-bit indices to a word; each slot's gradient, 0 without one;
// the slots.
struct WordLayout {
  // Indices of rows are below it, for there are no more rows than slots.
  static constexpr int64_t most_slots = 65536;
  static constexpr int64_t indices_per_word = 4;

  int64_t num_row_words;
  int64_t num_slots;

  constexpr int64_t indices() const { return num_row_words; }
  constexpr int64_t grads() const {
    return indices() + (num_slots + indices_per_word - 1) / indices_per_word;
  }
  constexpr int64_t slots() const { return grads() + num_slots; }
};

}  // namespace fused_ema
