// The schedules of an average's decay, in double, host and device: fused_ema/ema/decay.py holds the
// same formulas and says what they are.
#pragma once

#include <cmath>

#include "scaling.h"

namespace fused_ema {

// Behind the kinds of numbers, see cuda/fold.h: group_records.py writes both.
enum class Schedule : int64_t { cosine = 16, warm_up, inverse_gamma, power };

// The mean of t, t + 1, ..., t + kappa - 1, where kappa base steps read a schedule; not before 0.
FUSED_EMA_INLINE double midpoint(double t, double kappa) {
  return kappa == 1 ? t : at_least(t + (kappa - 1) / 2, 0.0);
}

// cos(pi*x). On a GPU by a function of its own: of large arguments the cosine takes memory.
FUSED_EMA_INLINE double cos_pi(double x) {
#if defined(__CUDA_ARCH__)
  return cospi(x);
#else
  constexpr double pi = 3.141592653589793;
  return std::cos(pi * x);
#endif
}

FUSED_EMA_INLINE double cosine_decay(double start, double total, double t, double kappa) {
  const double progress = at_most(midpoint(t, kappa) / total, 1.0);
  return 1 - (1 - start) * (cos_pi(progress) + 1) / 2;
}

FUSED_EMA_INLINE double warm_up_decay(double limit, double t, double kappa) {
  if (kappa == 1) return at_most((1 + t) / (10 + t), limit);
  const double end = limit == 1 ? HUGE_VAL : (10 * limit - 1) / (1 - limit);
  const double n = at_least(at_most(std::ceil(at_most(end - t, kappa)), kappa), 0.0);
  double logarithm = 0;
  for (int i = 1; i < 10; ++i) logarithm += std::log1p(n / (t + i));
  logarithm = -logarithm;
  if (limit < 1) logarithm += (kappa - n) * std::log(limit);
  return at_most(std::exp(logarithm / kappa), limit);
}

FUSED_EMA_INLINE double inverse_gamma_at(double limit, double inv_gamma, double power, double t) {
  return at_most(1 - std::pow(1 + t / inv_gamma, -power), limit);
}

FUSED_EMA_INLINE double inverse_gamma_decay(double limit, double inv_gamma, double power, double t,
                                            double kappa) {
  if (kappa == 1) return inverse_gamma_at(limit, inv_gamma, power, t);
  if (t == 0) return 0;
  const double side = std::sqrt(at_least(kappa * kappa - 1, 0.0) / 12), middle = midpoint(t, kappa);
  const double before = inverse_gamma_at(limit, inv_gamma, power, at_least(middle - side, 0.0));
  return std::sqrt(before * inverse_gamma_at(limit, inv_gamma, power, middle + side));
}

FUSED_EMA_INLINE double power_decay(double gamma, double t, double kappa) {
  return std::pow(t / (t + kappa), (gamma + 1) / kappa);
}

// rho of a step of kappa base steps from t, which is to be raised to kappa.
FUSED_EMA_INLINE double decay_at(Schedule schedule, const double* fields, double t, double kappa) {
  switch (schedule) {
    case Schedule::cosine:
      return cosine_decay(fields[0], fields[1], t, kappa);
    case Schedule::warm_up:
      return warm_up_decay(fields[0], t, kappa);
    case Schedule::inverse_gamma:
      return inverse_gamma_decay(fields[0], fields[1], fields[2], t, kappa);
    default:
      return power_decay(fields[0], t, kappa);
  }
}

}  // namespace fused_ema
