"""The optimizers' maths, once for Triton: one function per rule, and the EMA.

``csrc/rules.h`` and :mod:`fused_ema.rules` hold the same formulas under the same names.
Operations are in the order of the C++ rules, so that both give the same bits. A rule takes and
returns values:
``(param, grad, states, scalars) -> (param, states)``. States and scalars are tuples in the order of
the records in :mod:`fused_ema.rules`; flags are 0.0 or 1.0.
"""

from __future__ import annotations

import triton.language as tl

from .interpreter import device

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
def ema(average, param, weight):
    """``ema <- ema + weight * (param - ema)``, ``weight = 1 - rho**kappa``."""
    return lerp(average, param, weight)


@device
def ema_delta(delta, change, weight, BEFORE: tl.constexpr):
    """Move ``d = ema - param``, where param has moved by ``change``: ``d <- (1-w)*(d - change)``.

    Of averages that take the parameter from before, ``(1-w)*d - change``.
    """
    rest = delta if BEFORE else delta - change
    kept = lerp(rest, 0.0, weight)
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
    """``b <- carry*b + grad_weight*g``; ``p <- p - lr*(g + momentum*b if nesterov else b)``."""
    grad_factor, weight_decay, momentum, carry, grad_weight, nesterov, lr = scalars
    grad = directed(grad, param, grad_factor, weight_decay)
    if len(states) == 1:
        momentum_buffer = carry * states[0] + grad_weight * grad
        grad = tl.where(nesterov != 0, grad + momentum * momentum_buffer, momentum_buffer)
        states = (momentum_buffer,)
    return param - lr * grad, states


@device
def adam(param, grad, states, scalars):
    """``m <- lerp(m, g, 1-beta1)``; ``v <- lerp_square(v, g, 1-beta2)``.

    ``p <- p - (decay*p + step_size*m/(sqrt(v) + eps))``, with v's running maximum for amsgrad.
    """
    grad_factor, weight_decay, decay, weight1, weight2, step_size, eps = scalars
    grad = directed(grad, param, grad_factor, weight_decay)
    exp_avg = lerp(states[0], grad, weight1)
    exp_avg_sq = lerp_square(states[1], grad, weight2)
    second = exp_avg_sq
    if len(states) == 3:
        second = tl.where(second <= states[2], states[2], second)  # a NaN wins
        states = (exp_avg, exp_avg_sq, second)
    else:
        states = (exp_avg, exp_avg_sq)
    change = div(step_size * exp_avg, sqrt(second) + eps)
    decayed = tl.where(is_finite(param), change + decay * param, change)  # an infinity stays one
    change = tl.where(decay != 0, decayed, change)
    return param - change, states


RULES = {"frozen": frozen, "sgd": sgd, "adam": adam}
