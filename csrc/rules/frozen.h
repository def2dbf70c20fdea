// No rule at all: fused_ema/rules/frozen.py.
#pragma once

#include "rules/rule.h"

namespace fused_ema {

// A parameter that no rule moves; its averages still follow it.
struct Frozen {
  using Fold = Frozen;
  static constexpr const char* name = "frozen";
  static constexpr const char* variant = "plain";
  static constexpr int num_states = 0;
  static constexpr std::array numbers{"kappa"};
  static constexpr std::array<const char*, 0> flags{};
  static constexpr std::array<std::string_view, 0> scalars{};

  template <class T>
  struct Scalars {};

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&)[1], Flags, double) { return {}; }

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T&, T, T*, const Scalars<T>&, How&) {}
};

}  // namespace fused_ema
