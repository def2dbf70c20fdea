"""The optimizers' maths, once for Triton: one function per variant of a rule.

``csrc/rules`` and :mod:`fused_ema.rules` hold the same formulas under the same names.
Operations are in the order of the C++ rules, so that both give the same bits. A rule takes and
returns values:
``(param, grad, states, scalars) -> (param, states)``. States and scalars are tuples in the order of
the records in :mod:`fused_ema.rules`; flags are 0.0 or 1.0.

Attributes:
    RULES: the functions by the names of rule and variant.
    TRUST: of rules that take norms, what a pass before the step measures besides the weights, and
        the ratio of both norms, in float64. A step finds it in the place of its last scalar.
    FOLDS: what folds each rule's scalars where they are used: from a group's numbers, in the order
        of the records, the last of which is ``kappa``, its flags as bits, and the base steps.
"""

from __future__ import annotations

import triton.language as tl

from .blending import div, is_finite, lerp, lerp_square, sqrt, trust_ratio
from .interpreter import device
from .scaling import (
    beta_weight,
    bias_correction,
    decay_weight,
    decoupled_decay,
    momentum,
    momentum_entry,
    momentum_weights,
)


@device
def directed(grad, param, grad_factor, weight_decay):
    """The gradient to descend: ``grad_factor*g``, plus the L2 penalty ``weight_decay*p``."""
    grad = grad_factor * grad
    return tl.where(weight_decay != 0, grad + weight_decay * param, grad)


@device
def frozen(param, grad, states, scalars):
    """A parameter that no rule moves; its averages still follow it."""
    return param, states


@device
def sgd(param, grad, states, scalars):
    """``p <- p - lr*g``."""
    grad_factor, weight_decay, _, _, _, _, lr = scalars
    grad = directed(grad, param, grad_factor, weight_decay)
    return param - lr * grad, states


@device
def carried(grad, momentum_buffer, momentum, carry, grad_weight, nesterov):
    """The direction of SGD's momentum, and ``b <- carry*b + grad_weight*g``."""
    momentum_buffer = carry * momentum_buffer + grad_weight * grad
    grad = tl.where(nesterov != 0, grad + momentum * momentum_buffer, momentum_buffer)
    return grad, momentum_buffer


@device
def sgd_momentum(param, grad, states, scalars):
    """``b <- carry*b + grad_weight*g``; ``p <- p - lr*(g + momentum*b if nesterov else b)``."""
    grad_factor, weight_decay, momentum, carry, grad_weight, nesterov, lr = scalars
    (momentum_buffer,) = states
    grad = directed(grad, param, grad_factor, weight_decay)
    grad, momentum_buffer = carried(grad, momentum_buffer, momentum, carry, grad_weight, nesterov)
    return param - lr * grad, (momentum_buffer,)


@device
def adam_moments(param, grad, exp_avg, exp_avg_sq, scalars):
    """``m <- lerp(m, g, 1-beta1)``; ``v <- lerp_square(v, g, 1-beta2)``."""
    grad_factor, weight_decay, _, weight1, weight2, _, _ = scalars
    grad = directed(grad, param, grad_factor, weight_decay)
    return lerp(exp_avg, grad, weight1), lerp_square(exp_avg_sq, grad, weight2)


@device
def adam_change(param, exp_avg, second, scalars):
    """``decay*p + step_size*m/(sqrt(v) + eps)``."""
    _, _, decay, _, _, step_size, eps = scalars
    change = div(step_size * exp_avg, sqrt(second) + eps)
    decayed = tl.where(is_finite(param), change + decay * param, change)  # an infinity stays one
    return tl.where(decay != 0, decayed, change)


@device
def adam(param, grad, states, scalars):
    """``p`` less :func:`adam_change`."""
    exp_avg, exp_avg_sq = states
    exp_avg, exp_avg_sq = adam_moments(param, grad, exp_avg, exp_avg_sq, scalars)
    return param - adam_change(param, exp_avg, exp_avg_sq, scalars), (exp_avg, exp_avg_sq)


@device
def adam_amsgrad(param, grad, states, scalars):
    """As :func:`adam`, with ``v``'s running maximum in its place."""
    exp_avg, exp_avg_sq, largest = states
    exp_avg, exp_avg_sq = adam_moments(param, grad, exp_avg, exp_avg_sq, scalars)
    largest = tl.where(exp_avg_sq <= largest, largest, exp_avg_sq)  # a NaN wins
    return param - adam_change(param, exp_avg, largest, scalars), (exp_avg, exp_avg_sq, largest)


@device
def variance(square, mean):
    """``square - mean**2``, never less than nothing; of an infinite square itself."""
    rest = square - mean * mean
    rest = tl.where(rest < 0.0, 0.0, rest)  # a NaN stays one
    return tl.where(is_finite(square), rest, square)


@device
def rmsprop_square(param, grad, square_avg, scalars):
    """The gradient to descend, and ``v <- lerp_square(v, g, 1-alpha)``."""
    grad_factor, weight_decay, weight, _, _, _, _ = scalars
    grad = directed(grad, param, grad_factor, weight_decay)
    return grad, lerp_square(square_avg, grad, weight)


@device
def rmsprop_centered_square(param, grad, square_avg, grad_avg, scalars):
    """As :func:`rmsprop_square`, and ``m <- lerp(m, g, 1-alpha)``."""
    _, _, weight, _, _, _, _ = scalars
    grad, square_avg = rmsprop_square(param, grad, square_avg, scalars)
    return grad, square_avg, lerp(grad_avg, grad, weight)


@device
def rmsprop_change(grad, second, scalars):
    """``lr*d`` with ``d = g/(sqrt(v) + eps)``."""
    _, _, _, eps, _, _, lr = scalars
    return lr * div(grad, sqrt(second) + eps)


@device
def rmsprop_momentum_change(grad, second, momentum_buffer, scalars):
    """``b <- carry*b + entry*d``, and ``lr*b``."""
    _, _, _, eps, carry, entry, lr = scalars
    momentum_buffer = carry * momentum_buffer + entry * div(grad, sqrt(second) + eps)
    return momentum_buffer, lr * momentum_buffer


@device
def rmsprop(param, grad, states, scalars):
    """``p`` less :func:`rmsprop_change`."""
    (square_avg,) = states
    grad, square_avg = rmsprop_square(param, grad, square_avg, scalars)
    return param - rmsprop_change(grad, square_avg, scalars), (square_avg,)


@device
def rmsprop_momentum(param, grad, states, scalars):
    """``p`` less :func:`rmsprop_momentum_change`."""
    square_avg, buffer = states
    grad, square_avg = rmsprop_square(param, grad, square_avg, scalars)
    buffer, change = rmsprop_momentum_change(grad, square_avg, buffer, scalars)
    return param - change, (square_avg, buffer)


@device
def rmsprop_centered(param, grad, states, scalars):
    """As :func:`rmsprop`, by the variance."""
    square_avg, grad_avg = states
    grad, square_avg, grad_avg = rmsprop_centered_square(param, grad, square_avg, grad_avg, scalars)
    second = variance(square_avg, grad_avg)
    return param - rmsprop_change(grad, second, scalars), (square_avg, grad_avg)


@device
def rmsprop_centered_momentum(param, grad, states, scalars):
    """As :func:`rmsprop_momentum`, by the variance."""
    square_avg, buffer, grad_avg = states
    grad, square_avg, grad_avg = rmsprop_centered_square(param, grad, square_avg, grad_avg, scalars)
    second = variance(square_avg, grad_avg)
    buffer, change = rmsprop_momentum_change(grad, second, buffer, scalars)
    return param - change, (square_avg, buffer, grad_avg)


@device
def lars(param, grad, states, scalars):
    """``p <- p - lr*trust*g``."""
    grad_factor, weight_decay, _, _, _, _, lr, _, _, trust = scalars
    grad = directed(grad, param, grad_factor, weight_decay) * trust
    return param - lr * grad, states


@device
def lars_momentum(param, grad, states, scalars):
    """As :func:`sgd_momentum`, by ``trust*g``."""
    grad_factor, weight_decay, momentum, carry, grad_weight, nesterov, lr, _, _, trust = scalars
    (momentum_buffer,) = states
    grad = directed(grad, param, grad_factor, weight_decay) * trust
    grad, momentum_buffer = carried(grad, momentum_buffer, momentum, carry, grad_weight, nesterov)
    return param - lr * grad, (momentum_buffer,)


@device
def lars_measured(param, grad, states, scalars):
    """The gradient, without the penalty."""
    grad_factor, _, _, _, _, _, _, _, _, _ = scalars
    return grad_factor * grad


@device
def lars_ratio(weight, step, scalars):
    """``trust_coefficient*|p|/(|g| + weight_decay*|p| + eps)``."""
    _, weight_decay, _, _, _, _, _, trust_coefficient, eps, _ = scalars
    return trust_ratio(weight, step, weight * weight_decay + step + eps, trust_coefficient)


@device
def lamb_direction(param, grad, exp_avg, exp_avg_sq, scalars):
    """``u = correction*m/(sqrt(v) + eps) + weight_decay*p``, and the moments that it is made of."""
    grad_factor, weight_decay, weight1, weight2, correction, eps, _, _ = scalars
    grad = grad_factor * grad
    exp_avg = lerp(exp_avg, grad, weight1)
    exp_avg_sq = lerp_square(exp_avg_sq, grad, weight2)
    change = div(correction * exp_avg, sqrt(exp_avg_sq) + eps)
    decayed = tl.where(is_finite(param), change + weight_decay * param, change)
    return tl.where(weight_decay != 0, decayed, change), exp_avg, exp_avg_sq


@device
def lamb(param, grad, states, scalars):
    """``p <- p - lr*trust*u``, with :func:`lamb_direction`."""
    _, _, _, _, _, _, lr, trust = scalars
    exp_avg, exp_avg_sq = states
    change, exp_avg, exp_avg_sq = lamb_direction(param, grad, exp_avg, exp_avg_sq, scalars)
    return param - lr * (change * trust), (exp_avg, exp_avg_sq)


@device
def lamb_measured(param, grad, states, scalars):
    """The direction."""
    exp_avg, exp_avg_sq = states
    change, _, _ = lamb_direction(param, grad, exp_avg, exp_avg_sq, scalars)
    return change


@device
def lamb_ratio(weight, step, scalars):
    """``|p|/|u|``."""
    return trust_ratio(weight, step, step, 1.0)


RULES = {
    "frozen": {"plain": frozen},
    "sgd": {"plain": sgd, "momentum": sgd_momentum},
    "adam": {"plain": adam, "amsgrad": adam_amsgrad},
    "rmsprop": {
        "plain": rmsprop,
        "momentum": rmsprop_momentum,
        "centered": rmsprop_centered,
        "centered_momentum": rmsprop_centered_momentum,
    },
    "lars": {"plain": lars, "momentum": lars_momentum},
    "lamb": {"plain": lamb},
}
TRUST = {"lars": (lars_measured, lars_ratio), "lamb": (lamb_measured, lamb_ratio)}


@device
def is_set(flags, K: tl.constexpr):
    """Whether flag K of a param group is."""
    return ((flags >> K) & 1) != 0


@device
def sign(maximize):
    """The direction to go in, a factor of the gradient."""
    return tl.where(maximize, -1.0, 1.0).to(tl.float64)


@device
def fold_frozen(numbers, flags, step):
    """Nothing to fold."""
    return ()


@device
def fold_sgd(numbers, flags, step):
    """The scalars of :func:`sgd` after ``step`` base steps, in float64."""
    base_lr, mu, dampening, weight_decay, kappa = numbers
    nesterov = is_set(flags, 0)
    weights = momentum_weights(mu, dampening, kappa, nesterov, is_set(flags, 2), step)
    beside, carry, grad_weight, entry = weights
    lr = kappa * base_lr
    return (
        sign(is_set(flags, 1)),
        weight_decay,
        beside,
        carry,
        grad_weight,
        tl.where(nesterov, 1.0, 0.0).to(tl.float64),
        tl.where(nesterov, lr * entry, lr),
    )


@device
def fold_adam(numbers, flags, step):
    """The scalars of :func:`adam` after ``step`` base steps, in float64."""
    base_lr, beta1, beta2, eps, weight_decay, kappa = numbers
    decoupled, linear, unscaled = is_set(flags, 0), is_set(flags, 3), is_set(flags, 4)
    root = sqrt(kappa)
    lr = root * base_lr
    weight1, weight2 = beta_weight(beta1, kappa, linear), beta_weight(beta2, kappa, linear)
    decay = decoupled_decay(base_lr, lr, weight_decay, kappa, unscaled)
    bias_correction1 = bias_correction(weight1, kappa, step)
    bias_correction2_sqrt = sqrt(bias_correction(weight2, kappa, step))
    return (
        sign(is_set(flags, 2)),
        tl.where(decoupled, 0.0, weight_decay),
        tl.where(decoupled, decay, 0.0),
        weight1,
        weight2,
        lr * bias_correction2_sqrt / bias_correction1,
        eps / root * bias_correction2_sqrt,
    )


@device
def fold_rmsprop(numbers, flags, step):
    """The scalars of :func:`rmsprop`, in float64, the same after any ``step``."""
    base_lr, alpha, eps, weight_decay, mu, kappa = numbers
    exact, root = is_set(flags, 2), sqrt(kappa)
    return (
        sign(is_set(flags, 1)),
        weight_decay,
        decay_weight(alpha, kappa),
        eps / root,
        momentum(mu, kappa, exact),
        momentum_entry(mu, kappa, exact),
        root * base_lr,
    )


@device
def fold_lars(numbers, flags, step):
    """The scalars of :func:`lars_momentum` after ``step`` base steps, in float64."""
    base_lr, mu, weight_decay, trust_coefficient, eps, kappa = numbers
    nesterov = is_set(flags, 0)
    weights = momentum_weights(mu, 0.0, kappa, nesterov, is_set(flags, 2), step)
    beside, carry, grad_weight, entry = weights
    lr = kappa * base_lr
    return (
        sign(is_set(flags, 1)),
        weight_decay,
        beside,
        carry,
        grad_weight,
        tl.where(nesterov, 1.0, 0.0).to(tl.float64),
        tl.where(nesterov, lr * entry, lr),
        trust_coefficient,
        eps,
        tl.where(is_set(flags, 3), 1.0, 0.0).to(tl.float64),
    )


@device
def fold_lamb(numbers, flags, step):
    """The scalars of :func:`lamb` after ``step`` base steps, in float64."""
    base_lr, beta1, beta2, eps, weight_decay, kappa = numbers
    linear, root = is_set(flags, 1), sqrt(kappa)
    weight1, weight2 = beta_weight(beta1, kappa, linear), beta_weight(beta2, kappa, linear)
    bias_correction1 = bias_correction(weight1, kappa, step)
    bias_correction2_sqrt = sqrt(bias_correction(weight2, kappa, step))
    return (
        sign(is_set(flags, 0)),
        root * weight_decay,
        weight1,
        weight2,
        bias_correction2_sqrt / bias_correction1,
        eps / root * bias_correction2_sqrt,
        root * base_lr,
        tl.where(is_set(flags, 2), 1.0, 0.0).to(tl.float64),
    )


FOLDS = {
    "frozen": fold_frozen,
    "sgd": fold_sgd,
    "adam": fold_adam,
    "rmsprop": fold_rmsprop,
    "lars": fold_lars,
    "lamb": fold_lamb,
}
