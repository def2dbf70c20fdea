"""The scaling rules of "How to Scale Your EMA" (Busbridge et al., NeurIPS 2023, arXiv 2307.13813).

Training at batch size ``B`` is the base; at ``kappa * B`` every hyper-parameter moves so that one
step covers the same ground as ``kappa`` base steps. All functions are pure, work on Python floats
in float64 and accept any ``kappa > 0``, also fractional and below one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from .checks import check_kappa, check_range
from .realmath import Real, expm1, log, log1p, power, sqrt, surely, where

# What kappa drives: the optimizer's rules and the average, or one of them alone.
KappaScales: TypeAlias = Literal["all", "ema", "optimizer"]
# How a rule's numbers may follow kappa, where there is more than one way.
BetaScaling: TypeAlias = Literal["exponential", "linear"]
MomentumScaling: TypeAlias = Literal["none", "exact"]
WeightDecayScaling: TypeAlias = Literal["exact", "none"]


def ema_weight(ema_decay: float, kappa: float = 1.0) -> float:
    """Weight of the new value in a scaled moving average: ``1 - rho**kappa``.

    ``-expm1(kappa * log(rho))``, exact to the last bits where ``1 - rho**kappa`` would cancel.
    EMA Scaling Rule, Busbridge et al. 2023, Definition 1.2.

    Args:
        ema_decay: ``rho`` at the base batch size, in ``[0, 1]``.
        kappa: batch size / base batch size, ``> 0``.

    Returns:
        A weight in ``[0, 1]``: 0 for ``rho = 1`` (never moves), 1 for ``rho = 0`` (a copy).

    Raises:
        ValueError: an argument is out of its range.
    """
    check_range("ema_decay", ema_decay, 0.0, 1.0)
    check_kappa(kappa)
    return decay_weight(ema_decay, kappa)


def decay_weight(decay: Real, kappa: Real) -> Real:
    """``1 - decay**kappa``, unchecked; on tensors too. Exact where ``kappa`` is 1."""
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


def momentum(momentum: Real, kappa: Real, rule: MomentumScaling = "none") -> Real:
    """SGD momentum: unchanged (``"none"``, the paper's choice) or ``mu**kappa`` (``"exact"``)."""
    return power(momentum, kappa) if rule == "exact" else momentum


def momentum_entry(mu: Real, kappa: Real, rule: MomentumScaling = "none") -> Real | float:
    """What a gradient adds to SGD's momentum buffer, in units of the base batch.

    ``"none"``: 1. ``"exact"``: ``(1 - mu**kappa)/(1 - mu)``, as much as ``kappa`` base steps with
    this gradient add. With ``mu**kappa`` of the buffer kept and the learning rate ``kappa*lr`` a
    constant gradient then moves the weights as ``kappa`` base steps do in the long run.
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

    ``"exact"`` keeps ``kappa`` base steps: ``1 - (1 - lr*weight_decay)**kappa``; the weight decay
    that torch's form would need is this divided by the scaled lr, about ``sqrt(kappa)`` times the
    base one. ``"none"`` leaves the coefficient: ``scaled_lr * weight_decay``.

    Args:
        lr: base learning rate.
        scaled_lr: the learning rate used in the step.
        weight_decay: base coefficient (torch's AdamW meaning).
        kappa: batch size / base batch size.
        rule: ``"exact"`` or ``"none"``.

    Raises:
        ValueError: ``lr * weight_decay >= 1`` with ``kappa != 1``, which has no fractional power.
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
