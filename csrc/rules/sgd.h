// SGD: fused_ema/rules/sgd.py.
#pragma once

#include "rules/rule.h"
#include "scaling.h"

namespace fused_ema {

struct SgdFold {
  static constexpr const char* name = "sgd";
  static constexpr std::array numbers{"lr", "momentum", "dampening", "weight_decay", "kappa"};
  static constexpr std::array flags{"nesterov", "maximize", "momentum_scaling=exact"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, momentum, carry, grad_weight, nesterov, lr);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[5], Flags flags,
                                               double step) {
    const auto& [base_lr, mu, dampening, weight_decay, kappa] = numbers;
    const bool nesterov = flags[0], exact = flags[2];
    const double carry = fused_ema::momentum(mu, kappa, exact);
    const double entry = momentum_entry(mu, kappa, exact);
    const double lr = sgd_lr(base_lr, kappa);
    const bool first = step <= kappa;
    Scalars<double> c;
    c.grad_factor = sign(flags[1]);
    c.weight_decay = weight_decay;
    c.momentum = nesterov ? carry / entry : carry;
    c.carry = first ? 0 : carry;
    c.grad_weight = first ? entry : entry * (1 - dampening);
    c.nesterov = nesterov;
    c.lr = nesterov ? lr * entry : lr;
    return c;
  }
};

// Steps along the gradient to descend; `c` has SGD's scalars of momentum.
// buf <- carry*buf + grad_weight*g;  p <- p - lr * (nesterov ? g + momentum*buf : buf)
template <bool has_momentum, class T, class Scalars>
FUSED_EMA_INLINE void descend(T& param, T grad, T* states, const Scalars& c) {
  if constexpr (has_momentum) {
    T& momentum_buffer = states[0];
    momentum_buffer = c.carry * momentum_buffer + c.grad_weight * grad;
    grad = c.nesterov != T(0) ? grad + c.momentum * momentum_buffer : momentum_buffer;
  }
  param = param - c.lr * grad;
}

template <bool has_momentum>
struct Sgd : SgdFold {
  using Fold = SgdFold;
  static constexpr const char* variant = has_momentum ? "momentum" : "plain";
  static constexpr int num_states = has_momentum ? 1 : 0;

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How&) {
    descend<has_momentum>(param, directed(grad, param, c.grad_factor, c.weight_decay), states, c);
  }
};

}  // namespace fused_ema
