"""LAMB: its numbers at ``kappa``, a step's scalars, the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import scaling
from ..realmath import expm1, log1p, sqrt
from . import adam, trust
from .rule import (
    Group,
    Rule,
    Values,
    check_choices,
    check_shared,
    decayed,
    directed,
    lerp_,
    lerp_square_,
    matters,
    sign,
)


class Scaled(NamedTuple):
    """LAMB's hyper-parameters at ``kappa``; ``log_beta`` is per base step, for bias correction."""

    grad_factor: float
    weight_decay: float
    weight1: float
    weight2: float
    log_beta1: float
    log_beta2: float
    eps: float
    lr: float
    trust: bool


class Scalars(NamedTuple):
    """``correction``, ``eps`` hold the bias corrections; ``trust`` is 1 where the group adapts.

    In kernels the ratio of the parameter takes the place of ``trust``.
    """

    grad_factor: float
    weight_decay: float
    weight1: float
    weight2: float
    correction: float
    eps: float
    lr: float
    trust: bool


CHOICES = {"beta_scaling": scaling.BetaScaling}


def check(group: Group) -> None:
    check_shared(group)
    check_choices(group, CHOICES)
    adam.check_moments(group)


def scale(group: Group) -> Scaled:
    kappa = group["kappa"]
    weights = [scaling.beta_weight(beta, kappa, group["beta_scaling"]) for beta in group["betas"]]
    log_betas = [log1p(-weight) / kappa for weight in weights]
    return Scaled(
        grad_factor=sign(group["maximize"]),
        weight_decay=scaling.normalized_weight_decay(group["weight_decay"], kappa),
        weight1=weights[0],
        weight2=weights[1],
        log_beta1=log_betas[0],
        log_beta2=log_betas[1],
        eps=scaling.adaptive_eps(group["eps"], kappa),
        lr=scaling.adaptive_lr(group["lr"], kappa),
        trust=group["adapt"],
    )


def at_kappa(group: Group) -> dict[str, Any]:
    kappa = group["kappa"]
    return {
        "lr": scaling.adaptive_lr(group["lr"], kappa),
        "betas": tuple(scaling.beta(b, kappa, group["beta_scaling"]) for b in group["betas"]),
        "eps": scaling.adaptive_eps(group["eps"], kappa),
        "weight_decay": scaling.normalized_weight_decay(group["weight_decay"], kappa),
    }


def fold(hyper: Scaled, step: Any) -> Scalars:
    """Fold ``1 - beta**step`` in: ``correction*m/(sqrt(v) + eps)`` is Adam's corrected form."""
    bias_correction1 = -expm1(step * hyper.log_beta1)
    bias_correction2_sqrt = sqrt(-expm1(step * hyper.log_beta2))
    return Scalars(
        hyper.grad_factor,
        hyper.weight_decay,
        hyper.weight1,
        hyper.weight2,
        bias_correction2_sqrt / bias_correction1,
        hyper.eps * bias_correction2_sqrt,
        hyper.lr,
        hyper.trust,
    )


def update(param: Values, grad: Values, states: Mapping[str, Values], c: Scalars) -> None:
    """``p <- p - lr*r*u``, ``u = correction*m/(sqrt(v) + eps) + decay*p``, ``r = |p|/|u|``.

    You et al. 2020, arXiv 1904.00962; ``r`` is 1 where a norm is 0 or not finite.
    """
    exp_avg, exp_avg_sq = states["exp_avg"], states["exp_avg_sq"]
    grad = directed(grad, param, c.grad_factor, 0.0)
    lerp_(exp_avg, grad, c.weight1)
    lerp_square_(exp_avg_sq, grad, c.weight2)
    change = exp_avg.mul(c.correction).div(exp_avg_sq.sqrt().add(c.eps))
    if matters(c.weight_decay):
        change = decayed(change, param, c.weight_decay)
    if c.trust:
        weight, step = trust.norm(param), trust.norm(change)
        change = trust.scaled(change, trust.ratio(weight, step, step))
    param.sub_(change, alpha=c.lr)


LAMB = Rule(
    name="lamb",
    numbers=("lr", "betas", "eps", "weight_decay", "kappa"),
    flags=("maximize", "beta_scaling", "adapt"),
    choices=CHOICES,
    check=check,
    variants={"plain": ("exp_avg", "exp_avg_sq")},
    variant=lambda group: "plain",
    scale=scale,
    at_kappa=at_kappa,
    fold=fold,
    update=update,
    scalars=Scalars,
)
