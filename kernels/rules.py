"""The optimizers' maths, once for Triton: one function per variant of a rule, and the EMA.

``csrc/rules`` and :mod:`fused_ema.rules` hold the same formulas under the same names.
Operations are in the order of the C++ rules, so that both give the same bits. A rule takes and
returns values:
``(param, grad, states, scalars) -> (param, states)``. States and scalars are tuples in the order of
the records in :mod:`fused_ema.rules`; flags are 0.0 or 1.0.

Attributes:
    RULES: the functions by the names of rule and variant.
    FOLDS: what folds each rule's scalars where they are used: from a group's numbers, in the order
        of the records, the last of which is ``kappa``, its flags as bits, and the base steps.
"""

from __future__ import annotations

import triton.language as tl

from .interpreter import device
from .scaling import (
    beta_weight,
    decay_weight,
    decoupled_decay,
    expm1,
    log1p,
    momentum,
    momentum_entry,
)

INFINITY = tl.constexpr(float("inf"))


@device
def div(numerator, denominator):
    """The correctly rounded quotient; ``/`` is an approximation in float32."""
    if numerator.dtype == tl.float32:
        return tl.div_rn(numerator, denominator)
    return numerator / denominator


@device
def sqrt(value):
    """The correctly rounded root; ``tl.sqrt`` is an approximation in float32."""
    if value.dtype == tl.float32:
        return tl.sqrt_rn(value)
    return tl.sqrt(value)


@device
def is_finite(value):
    """Whether ``value`` is neither infinite nor a NaN."""
    return tl.abs(value) < INFINITY


@device
def blend(start, end, part, weight):
    """``start + weight*(end - start)``, or from the shares where the difference is not finite.

    ``part`` is ``weight*end``. Weight 0 leaves ``start``, weight 1 gives ``end``, whatever the
    other is, and a constant stays what it is, an infinity too.
    """
    change = end - start
    rest = 1.0 - weight
    near = tl.where(weight < 0.5, start + weight * change, end - change * rest)
    shares = tl.where(weight != 1.0, rest * start + part, part)
    shares = tl.where(weight != 0.0, shares, start)
    return tl.where(is_finite(change), near, shares)


@device
def lerp(start, end, weight):
    """``start + weight*(end - start)``."""
    return blend(start, end, weight * end, weight)


@device
def lerp_square(start, value, weight):
    """``lerp(start, value*value, weight)``, also where only the weighted square is finite."""
    return blend(start, value * value, weight * value * value, weight)


@device
def moved(start, end):
    """How far a value has moved: nowhere also where it stays infinite."""
    return tl.where(start == end, 0.0, end - start)


@device
def ema(average, param, rate):
    """``ema <- ema + rate * (param - ema)``, with the EMA rate ``1 - rho**kappa``."""
    return lerp(average, param, rate)


@device
def ema_delta(delta, change, rate, BEFORE: tl.constexpr):
    """Move the scaled difference ``d = ema - param`` of a param that has moved by ``change``.

    ``d <- (1 - rate)*(d - change)``, or ``(1 - rate)*d - change`` where the average takes the
    parameter from before the step.
    """
    rest = delta if BEFORE else delta - change
    kept = lerp(rest, 0.0, rate)
    return kept - change if BEFORE else kept


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
def sgd_momentum(param, grad, states, scalars):
    """``b <- carry*b + grad_weight*g``; ``p <- p - lr*(g + momentum*b if nesterov else b)``."""
    grad_factor, weight_decay, momentum, carry, grad_weight, nesterov, lr = scalars
    (momentum_buffer,) = states
    grad = directed(grad, param, grad_factor, weight_decay)
    momentum_buffer = carry * momentum_buffer + grad_weight * grad
    grad = tl.where(nesterov != 0, grad + momentum * momentum_buffer, momentum_buffer)
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
}


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
    nesterov, exact = is_set(flags, 0), is_set(flags, 2)
    carry = momentum(mu, kappa, exact)
    entry = momentum_entry(mu, kappa, exact)
    lr = kappa * base_lr
    first = step <= kappa
    return (
        sign(is_set(flags, 1)),
        weight_decay,
        tl.where(nesterov, carry / entry, carry),
        tl.where(first, 0.0, carry),
        tl.where(first, entry, entry * (1.0 - dampening)),
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
    bias_correction1 = -expm1(step * (log1p(-weight1) / kappa))
    bias_correction2_sqrt = sqrt(-expm1(step * (log1p(-weight2) / kappa)))
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


FOLDS = {"frozen": fold_frozen, "sgd": fold_sgd, "adam": fold_adam, "rmsprop": fold_rmsprop}
