// Adam and AdamW: fused_ema/rules/adam.py.
#pragma once

#include <cmath>

#include "rules/blending.h"
#include "rules/rule.h"
#include "scaling.h"

namespace fused_ema {

// 1 - beta^steps: one minus the product of the betas of all steps.
FUSED_EMA_INLINE double bias_correction(double weight, double kappa, double step) {
  return -std::expm1(step * (log1p_or_none(-weight) / kappa));
}

struct AdamFold {
  static constexpr const char* name = "adam";
  static constexpr std::array numbers{"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "kappa"};
  static constexpr std::array flags{"decoupled_weight_decay", "amsgrad", "maximize",
                                    "beta_scaling=linear", "weight_decay_scaling=none"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, decay, weight1, weight2, step_size, eps);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[6], Flags flags,
                                               double step) {
    const auto& [base_lr, beta1, beta2, eps, weight_decay, kappa] = numbers;
    const bool decoupled = flags[0], linear = flags[3], unscaled = flags[4];
    const double lr = adaptive_lr(base_lr, kappa);
    const double decay = decoupled_decay(base_lr, lr, weight_decay, kappa, unscaled);
    Scalars<double> c;
    c.weight1 = beta_weight(beta1, kappa, linear);
    c.weight2 = beta_weight(beta2, kappa, linear);
    const double bias_correction1 = bias_correction(c.weight1, kappa, step);
    const double bias_correction2_sqrt = std::sqrt(bias_correction(c.weight2, kappa, step));
    c.grad_factor = sign(flags[2]);
    c.weight_decay = decoupled ? 0 : weight_decay;
    c.decay = decoupled ? decay : 0;
    c.step_size = lr * bias_correction2_sqrt / bias_correction1;
    c.eps = adaptive_eps(eps, kappa) * bias_correction2_sqrt;
    return c;
  }
};

// m <- lerp(m, g, 1-beta1);  v <- lerp_square(v, g, 1-beta2)
// p <- p - (decay*p + step_size * m / (sqrt(v) + eps)), with v's running maximum for amsgrad
template <bool amsgrad>
struct Adam : AdamFold {
  using Fold = AdamFold;
  static constexpr const char* variant = amsgrad ? "amsgrad" : "plain";
  static constexpr int num_states = amsgrad ? 3 : 2;

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How& how) {
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    grad = directed(grad, param, c.grad_factor, c.weight_decay);
    exp_avg = lerp(exp_avg, grad, c.weight1, how);
    exp_avg_sq = lerp_square(exp_avg_sq, grad, c.weight2, how);
    T second = exp_avg_sq;
    if constexpr (amsgrad) {
      T& largest = states[2];
      largest = second <= largest ? largest : second;  // a NaN wins, as in torch.maximum
      second = largest;
    }
    const T change = c.step_size * exp_avg / (std::sqrt(second) + c.eps);
    const T pull = c.decay * param;
    const T decay = how.finite(param) ? pull : T(0);  // an infinity stays one
    param = param - select(c.decay != T(0), change + decay, change);
  }
};

}  // namespace fused_ema
