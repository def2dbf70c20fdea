"""Roots, quotients and averages of two values for Triton, as :mod:`fused_ema.rules.blending`.

Operations are in the order of ``csrc/rules/blending.h``, so that both give the same bits.
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
def counts(norm):
    """Whether a norm says how long something is."""
    return (norm > 0.0) & is_finite(norm)


@device
def trust_ratio(weight, step, denominator, coefficient):
    """``coefficient*weight/denominator``, or 1 unless both norms count."""
    both = counts(weight) & counts(step)
    return tl.where(both, weight * coefficient / tl.where(both, denominator, 1.0), 1.0)
