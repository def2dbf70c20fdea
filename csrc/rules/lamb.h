// LAMB: fused_ema/rules/lamb.py.
#pragma once

#include <cmath>

#include "rules/adam.h"
#include "rules/blending.h"
#include "rules/rule.h"
#include "rules/trust.h"
#include "scaling.h"

namespace fused_ema {

// m <- lerp(m, g, 1-beta1);  v <- lerp_square(v, g, 1-beta2)
// p <- p - lr*ratio*u,  u = correction * m / (sqrt(v) + eps) + weight_decay*p,  ratio = |p| / |u|
struct Lamb {
  using Fold = Lamb;
  static constexpr const char* name = "lamb";
  static constexpr const char* variant = "plain";
  static constexpr int num_states = 2;
  static constexpr int num_measured = 2;
  static constexpr std::array numbers{"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "kappa"};
  static constexpr std::array flags{"maximize", "beta_scaling=linear", "adapt"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, weight1, weight2, correction, eps, lr, trust);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[6], Flags flags,
                                               double step) {
    const auto& [base_lr, beta1, beta2, eps, weight_decay, kappa] = numbers;
    const bool linear = flags[1];
    Scalars<double> c;
    c.grad_factor = sign(flags[0]);
    c.weight_decay = normalized_weight_decay(weight_decay, kappa);
    c.weight1 = beta_weight(beta1, kappa, linear);
    c.weight2 = beta_weight(beta2, kappa, linear);
    const double bias_correction1 = bias_correction(c.weight1, kappa, step);
    const double bias_correction2_sqrt = std::sqrt(bias_correction(c.weight2, kappa, step));
    c.correction = bias_correction2_sqrt / bias_correction1;
    c.eps = adaptive_eps(eps, kappa) * bias_correction2_sqrt;
    c.lr = adaptive_lr(base_lr, kappa);
    c.trust = flags[2];
    return c;
  }

  template <class T>
  FUSED_EMA_INLINE static T measured(T param, T grad, const T* states, const Scalars<T>& c) {
    T moments[] = {states[0], states[1]};
    constexpr Exact exact;
    return direction(param, grad, moments, c, exact);
  }

  FUSED_EMA_INLINE static double ratio(double weight, double step, const Scalars<double>&) {
    return trust_ratio(weight, step, step);
  }

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How& how) {
    const T step = direction(param, grad, states, c, how);
    param = param - c.lr * (step * c.trust);
  }

 private:
  // Moves the moments.
  template <class T, class How>
  FUSED_EMA_INLINE static T direction(T param, T grad, T* states, const Scalars<T>& c, How& how) {
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    grad = directed(grad, param, c.grad_factor, T(0));
    exp_avg = lerp(exp_avg, grad, c.weight1, how);
    exp_avg_sq = lerp_square(exp_avg_sq, grad, c.weight2, how);
    const T change = c.correction * exp_avg / (std::sqrt(exp_avg_sq) + c.eps);
    const T pull = c.weight_decay * param;
    const T decay = how.finite(param) ? pull : T(0);  // an infinity stays one
    return select(c.weight_decay != T(0), change + decay, change);
  }
};

}  // namespace fused_ema
