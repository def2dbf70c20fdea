// LARS: fused_ema/rules/lars.py.
#pragma once

#include "rules/rule.h"
#include "rules/sgd.h"
#include "rules/trust.h"

namespace fused_ema {

struct LarsFold {
  static constexpr const char* name = "lars";
  static constexpr std::array numbers{"lr",  "momentum", "weight_decay", "trust_coefficient",
                                      "eps", "kappa"};
  static constexpr std::array flags{"nesterov", "maximize", "momentum_scaling=exact", "adapt"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, momentum, carry, grad_weight, nesterov, lr,
                    trust_coefficient, eps, trust);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[6], Flags flags,
                                               double step) {
    const auto& [lr, mu, weight_decay, trust_coefficient, eps, kappa] = numbers;
    const double of_sgd[] = {lr, mu, 0, weight_decay, kappa};  // whose flags come first
    const auto c = SgdFold::fold(of_sgd, flags, step);
    const double adapts = flags[3];
    return {c.grad_factor, c.weight_decay, c.momentum,        c.carry, c.grad_weight,
            c.nesterov,    c.lr,           trust_coefficient, eps,     adapts};
  }
};

// SGD's step by ratio*(g + weight_decay*p),
// ratio = trust_coefficient*|p| / (|g| + weight_decay*|p| + eps)
template <bool has_momentum>
struct Lars : LarsFold {
  using Fold = LarsFold;
  static constexpr const char* variant = has_momentum ? "momentum" : "plain";
  static constexpr int num_states = has_momentum ? 1 : 0;
  static constexpr int num_measured = 0;

  template <class T>
  FUSED_EMA_INLINE static T measured(T param, T grad, const T*, const Scalars<T>& c) {
    return directed(grad, param, c.grad_factor, T(0));
  }

  FUSED_EMA_INLINE static double ratio(double weight, double step, const Scalars<double>& c) {
    const double denominator = weight * c.weight_decay + step + c.eps;
    return trust_ratio(weight, step, denominator, c.trust_coefficient);
  }

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How&) {
    const T whole = directed(grad, param, c.grad_factor, c.weight_decay);
    descend<has_momentum>(param, whole * c.trust, states, c);
  }
};

}  // namespace fused_ema
