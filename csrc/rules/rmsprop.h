// RMSProp: fused_ema/rules/rmsprop.py.
#pragma once

#include <cmath>

#include "rules/blending.h"
#include "rules/rule.h"
#include "scaling.h"

namespace fused_ema {

// What a mean leaves of the mean of squares, never less than nothing; infinite squares have none.
template <class T>
FUSED_EMA_INLINE T variance(T square, T mean) {
  const T rest = square - mean * mean;
  const T positive = rest < T(0) ? T(0) : rest;  // a NaN stays one
  return is_finite(square) ? positive : square;
}

struct RmspropFold {
  static constexpr const char* name = "rmsprop";
  static constexpr std::array numbers{"lr", "alpha", "eps", "weight_decay", "momentum", "kappa"};
  static constexpr std::array flags{"centered", "maximize", "momentum_scaling=exact"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, weight, eps, carry, entry, lr);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[6], Flags flags, double) {
    const auto& [base_lr, alpha, eps, weight_decay, mu, kappa] = numbers;
    const bool exact = flags[2];
    Scalars<double> c;
    c.grad_factor = sign(flags[1]);
    c.weight_decay = weight_decay;
    c.weight = decay_weight(alpha, kappa);
    c.eps = adaptive_eps(eps, kappa);
    c.carry = momentum(mu, kappa, exact);
    c.entry = momentum_entry(mu, kappa, exact);
    c.lr = adaptive_lr(base_lr, kappa);
    return c;
  }
};

// v <- lerp_square(v, g, 1-alpha);  centered: m <- lerp(m, g, 1-alpha), and v - m^2 for v in
// d = g / (sqrt(v) + eps);  with momentum: buf <- carry*buf + entry*d, and buf for d in
// p <- p - lr*d
template <bool has_momentum, bool centered>
struct Rmsprop : RmspropFold {
  using Fold = RmspropFold;
  static constexpr const char* variant = has_momentum
                                             ? (centered ? "centered_momentum" : "momentum")
                                             : (centered ? "centered" : "plain");
  static constexpr int num_states = 1 + has_momentum + centered;

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How& how) {
    T& square_avg = states[0];
    grad = directed(grad, param, c.grad_factor, c.weight_decay);
    square_avg = lerp_square(square_avg, grad, c.weight, how);
    T second = square_avg;
    if constexpr (centered) {
      T& grad_avg = states[1 + has_momentum];
      grad_avg = lerp(grad_avg, grad, c.weight, how);
      second = variance(square_avg, grad_avg);
    }
    T direction = grad / (std::sqrt(second) + c.eps);
    if constexpr (has_momentum) {
      T& momentum_buffer = states[1];
      momentum_buffer = c.carry * momentum_buffer + c.entry * direction;
      direction = momentum_buffer;
    }
    param = param - c.lr * direction;
  }
};

}  // namespace fused_ema
