// The scaling rules, in double, host and device: fused_ema/scaling.py holds the same formulas under
// the same names. Logarithms are -infinity where there is nothing left of their argument.
#pragma once

#include <cmath>

#include "numeric.h"

namespace fused_ema {

FUSED_EMA_INLINE double at_most(double x, double limit) { return x <= limit ? x : limit; }
FUSED_EMA_INLINE double at_least(double x, double limit) { return x < limit ? limit : x; }

FUSED_EMA_INLINE double log1p_or_none(double x) { return std::log1p(at_least(x, -1.0)); }

// The weight of the new value in a scaled moving average: 1 - decay^kappa.
FUSED_EMA_INLINE double decay_weight(double decay, double kappa) {
  return kappa == 1 ? 1 - decay : -std::expm1(kappa * std::log(decay));
}

FUSED_EMA_INLINE double sgd_lr(double lr, double kappa) { return kappa * lr; }
FUSED_EMA_INLINE double adaptive_lr(double lr, double kappa) { return std::sqrt(kappa) * lr; }
FUSED_EMA_INLINE double adaptive_eps(double eps, double kappa) { return eps / std::sqrt(kappa); }

FUSED_EMA_INLINE double normalized_weight_decay(double weight_decay, double kappa) {
  return std::sqrt(kappa) * weight_decay;
}

FUSED_EMA_INLINE double beta_weight(double beta, double kappa, bool linear) {
  return linear ? kappa * (1 - beta) : decay_weight(beta, kappa);
}

FUSED_EMA_INLINE double momentum(double mu, double kappa, bool exact) {
  return exact ? std::pow(mu, kappa) : mu;
}

FUSED_EMA_INLINE double momentum_entry(double mu, double kappa, bool exact) {
  if (!exact) return 1;
  return mu == 1 ? kappa : (1 - std::pow(mu, kappa)) / (1 - mu);
}

FUSED_EMA_INLINE double decoupled_decay(double lr, double scaled_lr, double weight_decay,
                                        double kappa, bool unscaled) {
  if (unscaled || kappa == 1) return scaled_lr * weight_decay;
  return -std::expm1(kappa * log1p_or_none(-lr * weight_decay));
}

}  // namespace fused_ema
