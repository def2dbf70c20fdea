"""The scaling rules of "How to Scale Your EMA" (Busbridge et al., NeurIPS 2023, arXiv 2307.13813).

Hyper-parameters are given for the base batch size ``B``. At batch size ``kappa * B`` they change so
that one step does what ``kappa`` base steps do. All functions are pure, compute on Python floats in
float64, and accept any ``kappa > 0``, including fractions below one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from .checks import check_kappa, check_range
from .realmath import Real, expm1, log, log1p, power, sqrt, surely, where

# What kappa scales: the optimizer's hyper-parameters and the average, or one of the two.
KappaScales: TypeAlias = Literal["all", "ema", "optimizer"]
# Scaling rules of hyper-parameters that have more than one.
BetaScaling: TypeAlias = Literal["exponential", "linear"]
MomentumScaling: TypeAlias = Literal["none", "exact"]
WeightDecayScaling: TypeAlias = Literal["exact", "none"]


def ema_rate(ema_decay: float, kappa: float = 1.0) -> float:
    """EMA rate of a step: ``1 - rho**kappa``, how far the average moves to the weight.

    It is computed as ``-expm1(kappa * log(rho))``, which is exact to the last bits where
    ``1 - rho**kappa`` would cancel (EMA Scaling Rule, Busbridge et al. 2023, Definition 1.2).

    Args:
        ema_decay: ``rho`` at the base batch size, in ``[0, 1]``.
        kappa: batch size / base batch size, ``> 0``.

    Returns:
        A rate in ``[0, 1]``: 0 for ``rho = 1`` (never moves), 1 for ``rho = 0`` (a copy).

    Raises:
        ValueError: an argument is out of its range.
    """
    check_range("ema_decay", ema_decay, 0.0, 1.0)
    check_kappa(kappa)
    return decay_weight(ema_decay, kappa)


def ema_decay(rho: float, kappa: float = 1.0) -> float:
    """Decay of any running average at another batch size: ``rho**kappa``.

    For averages that the optimizers do not hold: BatchNorm's statistics
    (:func:`fused_ema.scale_batchnorm_momentum`), DINO's centre, a running mean of rewards. A step
    at ``kappa`` is then ``average.lerp_(value, 1 - ema_decay(rho, kappa))``, or, with a weight
    that does not cancel, ``average.lerp_(value, ema_rate(rho, kappa))``.

    Args:
        rho: decay at the base batch size, in ``[0, 1]``.
        kappa: batch size / base batch size, ``> 0``.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_range("rho", rho, 0.0, 1.0)
    check_kappa(kappa)
    return power(rho, kappa)


def decay_weight(decay: Real, kappa: Real) -> Real:
    """``1 - decay**kappa`` of floats or tensors, unchecked; exact for ``kappa = 1``."""
    return where(kappa == 1.0, 1.0 - decay, -expm1(kappa * log(decay)))


def sgd_lr(lr: Real, kappa: Real) -> Real:
    """Linear rule: ``kappa * lr`` (Goyal et al. 2017, arXiv 1706.02677)."""
    return kappa * lr


def adaptive_lr(lr: Real, kappa: Real) -> Real:
    """Square-root rule of Adam and RMSProp: ``sqrt(kappa) * lr`` (Malladi et al. 2022)."""
    return sqrt(kappa) * lr


def adaptive_eps(eps: Real, kappa: Real) -> Real:
    """``eps / sqrt(kappa)`` for Adam and RMSProp (Malladi et al. 2022, arXiv 2205.10287)."""
    return eps / sqrt(kappa)


def beta_weight(beta: Real, kappa: Real, rule: BetaScaling = "exponential") -> Real:
    """Weight ``1 - beta`` of the newest gradient after scaling.

    ``"exponential"``: ``1 - beta**kappa`` (the form of Busbridge et al. 2023, reconstructed);
    ``"linear"``: ``kappa * (1 - beta)`` (Malladi et al. 2022).

    Args:
        beta: decay at the base batch size, in ``[0, 1)``.
        kappa: batch size / base batch size, ``> 0``.
        rule: ``"exponential"`` or ``"linear"``.

    Returns:
        The weight, in ``(0, 1]``.

    Raises:
        ValueError: the linear rule drives the scaled beta out of ``[0, 1)``.
    """
    if rule == "exponential":
        return decay_weight(beta, kappa)
    weight = kappa * (1.0 - beta)
    if surely(weight > 1.0):
        raise ValueError(
            f"kappa={kappa} with beta_scaling='linear' gives beta = 1 - kappa*(1 - {beta}) = "
            f"{1.0 - weight:.6g}, outside [0, 1); use kappa <= {1.0 / (1.0 - beta):.6g} or "
            "beta_scaling='exponential'"
        )
    return weight


def beta(beta: Real, kappa: Real, rule: BetaScaling = "exponential") -> Real:
    """A scaled beta: ``beta**kappa``, or ``1 - kappa*(1 - beta)``; see :func:`beta_weight`."""
    if rule == "exponential":
        return power(beta, kappa)
    return 1.0 - beta_weight(beta, kappa, rule)


def momentum(momentum: Real, kappa: Real, rule: MomentumScaling = "none") -> Real:
    """SGD momentum: unchanged (``"none"``, the paper's choice) or ``mu**kappa`` (``"exact"``)."""
    return power(momentum, kappa) if rule == "exact" else momentum


def momentum_entry(mu: Real, kappa: Real, rule: MomentumScaling = "none") -> Real | float:
    """Factor of a gradient that is added to SGD's momentum buffer, in units of the base batch.

    ``"none"``: 1. ``"exact"``: ``(1 - mu**kappa)/(1 - mu)``, which is what ``kappa`` base steps
    with this gradient add. A step that keeps ``mu**kappa`` of the buffer and uses the learning rate
    ``kappa*lr`` then moves the weights, under a constant gradient, as ``kappa`` base steps do in
    the long run.
    """
    if rule == "none":
        return 1.0
    at_limit = mu == 1.0
    ratio = (1.0 - power(mu, kappa)) / where(at_limit, 1.0, 1.0 - mu)
    return where(at_limit, kappa, ratio)


def decoupled_decay(
    lr: Real, scaled_lr: Real, weight_decay: Real, kappa: Real, rule: WeightDecayScaling
) -> Real:
    """Share of a weight that AdamW's decay removes in one scaled step.

    ``"exact"`` removes what ``kappa`` base steps do, ``1 - (1 - lr*weight_decay)**kappa``. In
    torch's form, this corresponds to a weight decay of that share divided by the scaled lr, about
    ``sqrt(kappa)`` times the base one. ``"none"`` keeps the coefficient:
    ``scaled_lr * weight_decay``.

    Args:
        lr: base learning rate.
        scaled_lr: the learning rate used in the step.
        weight_decay: base coefficient, as in torch's AdamW.
        kappa: batch size / base batch size.
        rule: ``"exact"`` or ``"none"``.

    Raises:
        ValueError: ``lr * weight_decay >= 1`` with ``kappa != 1``: the kept share has no fractional
            power.
    """
    unscaled = scaled_lr * weight_decay
    if rule == "none":
        return unscaled
    if surely(kappa != 1.0) and surely(lr * weight_decay >= 1.0):
        raise ValueError(
            f"weight_decay={weight_decay} with lr={lr} removes the whole weight at every base "
            f"step; (1 - lr*weight_decay)**kappa at kappa={kappa} needs lr*weight_decay < 1: lower "
            "one of them or set weight_decay_scaling='none'"
        )
    return where(kappa == 1.0, unscaled, -expm1(kappa * log1p(-lr * weight_decay)))


def adaptive_weight_decay(
    lr: float, weight_decay: float, kappa: float, rule: WeightDecayScaling
) -> float:
    """AdamW's weight decay in torch's form: :func:`decoupled_decay` over the scaled lr.

    About ``sqrt(kappa)`` times the base coefficient with ``"exact"``, and that itself with
    ``"none"``. The arguments and errors are those of :func:`decoupled_decay`.
    """
    if rule == "none" or kappa == 1.0:
        return weight_decay
    scaled_lr = adaptive_lr(lr, kappa)
    if scaled_lr == 0.0:  # the limit
        return sqrt(kappa) * weight_decay
    return decoupled_decay(lr, scaled_lr, weight_decay, kappa, rule) / scaled_lr


def normalized_weight_decay(weight_decay: Real, kappa: Real) -> Real:
    """``sqrt(kappa) * weight_decay`` for LAMB, whose steps have the length of the learning rate.

    A step removes about ``lr*weight_decay*|w|/|u|`` of a weight, of which ``|w|/|u|`` hardly
    depends on the batch size, because the noise of Adam's normalized gradient does not. So with
    ``sqrt(kappa)*lr`` a step removes what ``kappa`` base steps do, and the decay keeps its size
    beside the mean of the normalized gradient, which also grows by ``sqrt(kappa)``. It is the first
    order of :func:`decoupled_decay`. The rule is ours: no paper is known that has one.
    """
    return sqrt(kappa) * weight_decay
