"""RMSProp: its numbers at ``kappa``, a step's scalars, the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import scaling
from ..checks import check_range
from .rule import (
    Group,
    Rule,
    Values,
    check_choices,
    check_shared,
    directed,
    lerp_,
    lerp_square_,
    sign,
)


class Scalars(NamedTuple):
    """The hyper-parameters at ``kappa``, the same at every step.

    ``weight`` is 1 - alpha, ``carry`` what a step keeps of the momentum buffer, ``entry`` the
    weight of what enters it.
    """

    grad_factor: float
    weight_decay: float
    weight: float
    eps: float
    carry: float
    entry: float
    lr: float


CHOICES = {"momentum_scaling": scaling.MomentumScaling}


def check(group: Group) -> None:
    check_shared(group)
    check_choices(group, CHOICES)
    check_range("alpha", group["alpha"], 0.0, 1.0)
    check_range("eps", group["eps"], 0.0, math.inf)
    check_range("momentum", group["momentum"], 0.0, math.inf)


def variant(group: Group) -> str:
    if group["momentum"] != 0:
        return "centered_momentum" if group["centered"] else "momentum"
    return "centered" if group["centered"] else "plain"


def scale(group: Group) -> Scalars:
    """The buffer is kept in units of the base batch, as SGD's."""
    kappa, mu, rule = group["kappa"], group["momentum"], group["momentum_scaling"]
    return Scalars(
        grad_factor=sign(group["maximize"]),
        weight_decay=group["weight_decay"],
        weight=scaling.decay_weight(group["alpha"], kappa),
        eps=scaling.adaptive_eps(group["eps"], kappa),
        carry=scaling.momentum(mu, kappa, rule),
        entry=scaling.momentum_entry(mu, kappa, rule),
        lr=scaling.adaptive_lr(group["lr"], kappa),
    )


def at_kappa(group: Group) -> dict[str, Any]:
    """Torch's buffer takes in once what enters this one ``entry`` times."""
    hyper = scale(group)
    return {
        "lr": hyper.lr * hyper.entry,
        "alpha": scaling.beta(group["alpha"], group["kappa"]),
        "eps": hyper.eps,
        "weight_decay": hyper.weight_decay,
        "momentum": hyper.carry,
    }


def update(param: Values, grad: Values, states: Mapping[str, Values], c: Scalars) -> None:
    """``p <- p - lr*d`` with ``d = g/(sqrt(v) + eps)``, or its momentum ``b <- carry*b + entry*d``.

    Tieleman & Hinton 2012; centered, by the variance: Graves 2013, arXiv 1308.0850.
    """
    second = states["square_avg"]
    grad = directed(grad, param, c.grad_factor, c.weight_decay)
    lerp_square_(second, grad, c.weight)
    if "grad_avg" in states:
        lerp_(states["grad_avg"], grad, c.weight)
        second = variance(second, states["grad_avg"])
    direction = grad.div(second.sqrt().add(c.eps))
    if "momentum_buffer" in states:
        direction = states["momentum_buffer"].mul_(c.carry).add_(direction, alpha=c.entry)
    param.sub_(direction, alpha=c.lr)


def variance(square: Values, mean: Values) -> Values:
    """``square - mean**2``, never less than nothing; of an infinite square itself."""
    rest = square.addcmul(mean, mean, value=-1.0).clamp_min(0.0)
    return rest.where(square.isfinite(), square) if isinstance(square, Tensor) else rest


RMSPROP = Rule(
    name="rmsprop",
    numbers=("lr", "alpha", "eps", "weight_decay", "momentum", "kappa"),
    flags=("centered", "maximize", "momentum_scaling"),
    choices=CHOICES,
    check=check,
    variants={
        "plain": ("square_avg",),
        "momentum": ("square_avg", "momentum_buffer"),
        "centered": ("square_avg", "grad_avg"),
        "centered_momentum": ("square_avg", "momentum_buffer", "grad_avg"),
    },
    variant=variant,
    scale=scale,
    at_kappa=at_kappa,
    fold=lambda hyper, step: hyper,
    update=update,
    scalars=Scalars,
)
