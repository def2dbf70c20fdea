// Trust ratios: how long the step of a whole parameter is beside the parameter itself.
// fused_ema/rules/trust.py has the same.
//
// A rule with a ratio names its last scalar `trust`: 1 in rows of groups that adapt, else 0. It has
// measured(), of which a pass before the step takes the norm, besides that of the weights; it looks
// at the first num_measured states. ratio() makes the ratio of both norms. update() finds it in the
// place of `trust`.
#pragma once

#include <cmath>

#include "rules/blending.h"
#include "rules/rule.h"

namespace fused_ema {

// Whether a norm says how long something is.
FUSED_EMA_INLINE bool counts(double norm) { return norm > 0 && is_finite(norm); }

// coefficient*weight/denominator, or 1 unless the norms of a parameter and of its step both count.
FUSED_EMA_INLINE double trust_ratio(double weight, double step, double denominator,
                                    double coefficient = 1) {
  return counts(weight) && counts(step) ? weight * coefficient / denominator : 1;
}

// The ratio of a parameter: from the sums of squares of its weights and of what is measured, and
// its row of scalars.
template <class Rule>
FUSED_EMA_INLINE double trust_of(double weights, double steps, const double* row) {
  const auto scalars = scalars_of<Rule, double>(row, 1, 1);
  return Rule::ratio(std::sqrt(weights), std::sqrt(steps), scalars);
}

}  // namespace fused_ema
