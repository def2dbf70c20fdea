"""Adam and AdamW: their numbers at ``kappa``, a step's scalars, the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import scaling
from ..checks import check_range
from ..realmath import expm1, log1p, sqrt
from .rule import (
    POSITIONS,
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
    """Adam's hyper-parameters at ``kappa``; ``log_beta`` is per base step, for bias correction."""

    grad_factor: float
    weight_decay: float
    decay: float
    weight1: float
    weight2: float
    log_beta1: float
    log_beta2: float
    lr: float
    eps: float


class Scalars(NamedTuple):
    """``weight1``, ``weight2`` are 1 - beta; ``step_size``, ``eps`` hold the bias corrections."""

    grad_factor: float
    weight_decay: float
    decay: float
    weight1: float
    weight2: float
    step_size: float
    eps: float


CHOICES = {
    "beta_scaling": scaling.BetaScaling,
    "weight_decay_scaling": scaling.WeightDecayScaling,
}


def check(group: Group) -> None:
    check_shared(group)
    check_choices(group, CHOICES)
    check_moments(group)


def check_moments(group: Group) -> None:
    """Raise ValueError for what the moments cannot be made with."""
    check_range("eps", group["eps"], 0.0, math.inf)
    if not isinstance(group["betas"], tuple) or len(group["betas"]) != POSITIONS["betas"]:
        raise ValueError(f"betas={group['betas']!r} is not known; allowed: two numbers")
    for i, beta in enumerate(group["betas"]):
        check_range(f"betas[{i}]", beta, 0, 1, ends=("<=", "<"))


def variant(group: Group) -> str:
    return "amsgrad" if group["amsgrad"] else "plain"


def scale(group: Group) -> Scaled:
    kappa, base_lr, weight_decay = group["kappa"], group["lr"], group["weight_decay"]
    lr = scaling.adaptive_lr(base_lr, kappa)
    decoupled = group["decoupled_weight_decay"]
    weights = [scaling.beta_weight(beta, kappa, group["beta_scaling"]) for beta in group["betas"]]
    log_betas = [log1p(-weight) / kappa for weight in weights]
    return Scaled(
        grad_factor=sign(group["maximize"]),
        weight_decay=0.0 if decoupled else weight_decay,
        decay=scaling.decoupled_decay(
            base_lr, lr, weight_decay, kappa, group["weight_decay_scaling"]
        )
        if decoupled
        else 0.0,
        weight1=weights[0],
        weight2=weights[1],
        log_beta1=log_betas[0],
        log_beta2=log_betas[1],
        lr=lr,
        eps=scaling.adaptive_eps(group["eps"], kappa),
    )


def at_kappa(group: Group) -> dict[str, Any]:
    kappa, lr, weight_decay = group["kappa"], group["lr"], group["weight_decay"]
    if group["decoupled_weight_decay"]:
        rule = group["weight_decay_scaling"]
        weight_decay = scaling.adaptive_weight_decay(lr, weight_decay, kappa, rule)
    return {
        "lr": scaling.adaptive_lr(lr, kappa),
        "betas": tuple(scaling.beta(b, kappa, group["beta_scaling"]) for b in group["betas"]),
        "eps": scaling.adaptive_eps(group["eps"], kappa),
        "weight_decay": weight_decay,
    }


def fold(hyper: Scaled, step: Any) -> Scalars:
    """Fold ``1 - beta**step`` in: ``step_size*m/(sqrt(v) + eps)`` is Adam's corrected form."""
    bias_correction1 = -expm1(step * hyper.log_beta1)
    bias_correction2_sqrt = sqrt(-expm1(step * hyper.log_beta2))
    return Scalars(
        hyper.grad_factor,
        hyper.weight_decay,
        hyper.decay,
        hyper.weight1,
        hyper.weight2,
        hyper.lr * bias_correction2_sqrt / bias_correction1,
        hyper.eps * bias_correction2_sqrt,
    )


def update(param: Values, grad: Values, states: Mapping[str, Values], c: Scalars) -> None:
    """``p <- p - (decay*p + step_size*m/(sqrt(v) + eps))``.

    Kingma & Ba 2015; amsgrad: Reddi et al. 2018; decay: Loshchilov & Hutter 2019.
    """
    exp_avg, exp_avg_sq = states["exp_avg"], states["exp_avg_sq"]
    grad = directed(grad, param, c.grad_factor, c.weight_decay)
    lerp_(exp_avg, grad, c.weight1)
    lerp_square_(exp_avg_sq, grad, c.weight2)
    if "max_exp_avg_sq" in states:
        exp_avg_sq = states["max_exp_avg_sq"].clamp_min_(exp_avg_sq)
    change = exp_avg.mul(c.step_size).div(exp_avg_sq.sqrt().add(c.eps))
    if matters(c.decay):
        change = decayed(change, param, c.decay)
    param.sub_(change)


ADAM = Rule(
    name="adam",
    numbers=("lr", "betas", "eps", "weight_decay", "kappa"),
    flags=(
        *("decoupled_weight_decay", "amsgrad", "maximize"),
        *("beta_scaling", "weight_decay_scaling"),
    ),
    choices=CHOICES,
    check=check,
    variants={
        "plain": ("exp_avg", "exp_avg_sq"),
        "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    },
    variant=variant,
    scale=scale,
    at_kappa=at_kappa,
    fold=fold,
    update=update,
    scalars=Scalars,
)
