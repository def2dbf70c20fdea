"""LARS: its numbers at ``kappa``, a step's scalars, the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..checks import check_range
from . import sgd, trust
from .rule import Group, Rule, Values, check_choices, check_shared, directed


class Scaled(NamedTuple):
    """SGD's hyper-parameters at ``kappa``, and what the ratio takes."""

    sgd: sgd.Scaled
    trust_coefficient: float
    eps: float
    trust: bool


class Scalars(NamedTuple):
    """Those of SGD, and of the ratio; ``trust`` is 1 where the group adapts.

    In kernels the ratio of the parameter takes the place of ``trust``.
    """

    grad_factor: float
    weight_decay: float
    momentum: float
    carry: float
    grad_weight: float
    nesterov: bool
    lr: float
    trust_coefficient: float
    eps: float
    trust: bool


def check(group: Group) -> None:
    check_shared(group)
    check_choices(group, sgd.CHOICES)
    check_range("momentum", group["momentum"], 0.0, math.inf)
    check_range("trust_coefficient", group["trust_coefficient"], 0.0, math.inf)
    check_range("eps", group["eps"], 0.0, math.inf)
    if group["nesterov"] and group["momentum"] <= 0:
        raise ValueError(
            f"nesterov=True requires momentum > 0; received momentum={group['momentum']}"
        )


def scale(group: Group) -> Scaled:
    """The learning rate by the linear rule, as SGD's; what the ratio takes is unchanged."""
    hyper = sgd.scale({**group, "dampening": 0.0})
    return Scaled(hyper, group["trust_coefficient"], group["eps"], group["adapt"])


def at_kappa(group: Group) -> dict[str, Any]:
    """As of SGD: the values of a LARS whose buffer takes a gradient in once."""
    numbers = sgd.at_kappa({**group, "dampening": 0.0})
    del numbers["dampening"]
    return {**numbers, "trust_coefficient": group["trust_coefficient"], "eps": group["eps"]}


def fold(hyper: Scaled, step: Any) -> Scalars:
    weights = sgd.fold(hyper.sgd, step)
    return Scalars(*weights, hyper.trust_coefficient, hyper.eps, hyper.trust)


def update(param: Values, grad: Values, states: Mapping[str, Values], c: Scalars) -> None:
    """SGD's step by ``r*(g + decay*p)``, ``r = coefficient*|p|/(|g| + decay*|p| + eps)``.

    You, Gitman & Ginsburg 2017, arXiv 1708.03888; ``r`` is 1 where a norm is 0 or not finite.
    """
    descent = directed(grad, param, c.grad_factor, c.weight_decay)
    if c.trust:
        weight = trust.norm(param)
        step = trust.norm(directed(grad, param, c.grad_factor, 0.0))
        denominator = weight.mul(c.weight_decay).add(step).add(c.eps)
        ratio = trust.ratio(weight, step, denominator, c.trust_coefficient)
        descent = trust.scaled(descent, ratio)
    sgd.descend(param, descent, states, c)


LARS = Rule(
    name="lars",
    numbers=("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "kappa"),
    flags=("nesterov", "maximize", "momentum_scaling", "adapt"),
    choices=sgd.CHOICES,
    check=check,
    variants=sgd.SGD.variants,
    variant=sgd.variant,
    scale=scale,
    at_kappa=at_kappa,
    fold=fold,
    update=update,
    scalars=Scalars,
)
