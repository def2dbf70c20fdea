"""Schedules of an average's decay for Triton, in float64: :mod:`fused_ema.ema.decay`'s."""

from __future__ import annotations

import triton.language as tl

from .interpreter import device
from .scaling import at_least, at_most, log1p, power

PI = tl.constexpr(3.141592653589793)
NEVER = tl.constexpr(float("inf"))


@device
def midpoint(t, kappa):
    """Where ``kappa`` base steps from ``t`` read a schedule."""
    return tl.where(kappa == 1.0, t, at_least(t + (kappa - 1.0) / 2.0, 0.0))


@device
def cos_pi(x):
    """``cos(pi*x)`` of ``0 <= x <= 1``: a series of the sine, which has its largest terms first.

    Triton's cosine is for all arguments, and takes a thread's memory for the large ones.
    """
    z = (0.5 - x) * PI
    square = z * z
    series = x * 0.0 + 1.0
    for k in tl.static_range(10):
        series = 1.0 - series * square * (1.0 / ((20 - 2 * k) * (21 - 2 * k)))
    return z * series


@device
def cosine_decay(start, total, t, kappa):
    """:class:`~fused_ema.CosineDecay`."""
    progress = at_most(midpoint(t, kappa) / total, 1.0)
    return 1.0 - (1.0 - start) * (cos_pi(progress) + 1.0) / 2.0


@device
def warm_up_decay(limit, t, kappa):
    """:class:`~fused_ema.WarmUpDecay`."""
    at_once = at_most((1.0 + t) / (10.0 + t), limit)
    forever = limit == 1.0
    end = tl.where(forever, NEVER, (10.0 * limit - 1.0) / tl.where(forever, 1.0, 1.0 - limit))
    n = at_least(at_most(tl.ceil(at_most(end - t, kappa)), kappa), 0.0)
    logarithm = t * 0.0
    for i in range(1, 10):
        logarithm += log1p(n / (t + i))
    rest = tl.where(forever, 0.0, (kappa - n) * tl.log(limit))
    mean = at_most(tl.exp((rest - logarithm) / kappa), limit)
    return tl.where(kappa == 1.0, at_once, mean)


@device
def inverse_gamma_at(limit, inv_gamma, exponent, t):
    """:class:`~fused_ema.InverseGammaDecay` after ``t`` base steps."""
    return at_most(1.0 - power(1.0 + t / inv_gamma, -exponent), limit)


@device
def inverse_gamma_decay(limit, inv_gamma, exponent, t, kappa):
    """:class:`~fused_ema.InverseGammaDecay`."""
    at_once = inverse_gamma_at(limit, inv_gamma, exponent, t)
    side = tl.sqrt(at_least(kappa * kappa - 1.0, 0.0) / 12.0)
    middle = midpoint(t, kappa)
    before = inverse_gamma_at(limit, inv_gamma, exponent, at_least(middle - side, 0.0))
    behind = inverse_gamma_at(limit, inv_gamma, exponent, middle + side)
    mean = tl.where(t == 0.0, 0.0, tl.sqrt(before * behind))
    return tl.where(kappa == 1.0, at_once, mean)


@device
def power_decay(gamma, t, kappa):
    """:class:`~fused_ema.PowerDecay`."""
    return power(t / (t + kappa), (gamma + 1.0) / kappa)
