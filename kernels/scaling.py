"""The scaling rules for Triton, in float64: :mod:`fused_ema.scaling` has the same formulas.

Functions that Triton has no operation for are made of ``exp`` and ``log``, in the interpreter as on
a device, to a few units in the last place. Logarithms are ``-inf`` where nothing is left of their
argument.
"""

from __future__ import annotations

import triton.language as tl

from .interpreter import device


@device
def at_most(x, limit):
    """The smaller of both."""
    return tl.where(x <= limit, x, limit)


@device
def at_least(x, limit):
    """The larger of both."""
    return tl.where(x < limit, limit, x)


@device
def log1p(x):
    """``log(1 + x)``: what rounding ``1 + x`` loses is in the ratio to what it gives."""
    x = at_least(x, -1.0)
    y = 1.0 + x
    near = y == 1.0
    return tl.where(near, x, tl.log(y) * (x / tl.where(near, 1.0, y - 1.0)))


@device
def expm1(x):
    """``exp(x) - 1`` of ``x <= 0``, likewise from the logarithm of what rounding makes of it."""
    y = tl.exp(x)
    near, none = y == 1.0, y < 2.0**-60
    ratio = x / tl.log(tl.where(near | none, 2.0, y))
    return tl.where(near, x, tl.where(none, -1.0, (y - 1.0) * ratio))


@device
def power(x, y):
    """``x**y`` of ``x >= 0``."""
    return tl.where(y == 0.0, 1.0, tl.exp(y * tl.log(x)))


@device
def decay_weight(decay, kappa):
    """The weight of the new value in a scaled moving average: ``1 - decay**kappa``."""
    return tl.where(kappa == 1.0, 1.0 - decay, -expm1(kappa * tl.log(decay)))


@device
def beta_weight(beta, kappa, linear):
    """Weight ``1 - beta`` of the newest gradient after scaling."""
    return tl.where(linear, kappa * (1.0 - beta), decay_weight(beta, kappa))


@device
def momentum(mu, kappa, exact):
    """SGD's momentum: unchanged, or ``mu**kappa``."""
    return tl.where(exact, power(mu, kappa), mu)


@device
def momentum_entry(mu, kappa, exact):
    """What a gradient adds to SGD's momentum buffer, in units of the base batch."""
    at_limit = mu == 1.0
    ratio = (1.0 - power(mu, kappa)) / tl.where(at_limit, 1.0, 1.0 - mu)
    return tl.where(exact, tl.where(at_limit, kappa, ratio), 1.0)


@device
def decoupled_decay(lr, scaled_lr, weight_decay, kappa, unscaled):
    """Share of a weight that AdamW's decay removes in one scaled step."""
    exact = -expm1(kappa * log1p(-lr * weight_decay))
    return tl.where(unscaled | (kappa == 1.0), scaled_lr * weight_decay, exact)


@device
def momentum_weights(mu, dampening, kappa, nesterov, exact, step):
    """SGD's ``momentum``, ``carry`` and ``grad_weight`` of a step, and a gradient's entry."""
    carry = momentum(mu, kappa, exact)
    entry = momentum_entry(mu, kappa, exact)
    first = step <= kappa
    return (
        tl.where(nesterov, carry / entry, carry),
        tl.where(first, 0.0, carry),
        tl.where(first, entry, entry * (1.0 - dampening)),
        entry,
    )


@device
def bias_correction(weight, kappa, step):
    """One minus the product of the betas of all steps."""
    return -expm1(step * (log1p(-weight) / kappa))
