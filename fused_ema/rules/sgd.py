"""SGD: its numbers at ``kappa``, a step's scalars, the update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import scaling
from ..checks import check_range
from ..realmath import where
from .rule import (
    Group,
    Rule,
    Values,
    check_choices,
    check_shared,
    directed,
    sign,
)


class Scaled(NamedTuple):
    """SGD's hyper-parameters at ``kappa``; ``entry`` is the weight of a buffer's first gradient."""

    grad_factor: float
    weight_decay: float
    momentum: float
    carry: float
    entry: float
    grad_weight: float
    nesterov: bool
    lr: float
    kappa: float


class Scalars(NamedTuple):
    """``carry`` is what a step keeps of the buffer, 0 at the first one, where a gradient enters.

    ``momentum`` is the weight of the buffer beside the gradient in a step of Nesterov's.
    """

    grad_factor: float
    weight_decay: float
    momentum: float
    carry: float
    grad_weight: float
    nesterov: bool
    lr: float


CHOICES = {"momentum_scaling": scaling.MomentumScaling}


def check(group: Group) -> None:
    check_shared(group)
    check_range("momentum", group["momentum"], 0.0, math.inf)
    check_choices(group, CHOICES)
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True requires momentum > 0 and dampening = 0; received "
            f"momentum={group['momentum']}, dampening={group['dampening']}"
        )


def variant(group: Group) -> str:
    return "momentum" if group["momentum"] != 0 else "plain"


def scale(group: Group) -> Scaled:
    """The buffer is kept in units of the base batch: ``entry`` times that of a run at ``kappa``.

    Under a constant gradient it tends to ``g/(1 - mu)`` at every ``kappa``, so that it means the
    same before and after a change.
    """
    kappa, mu, rule = group["kappa"], group["momentum"], group["momentum_scaling"]
    carry, entry = scaling.momentum(mu, kappa, rule), scaling.momentum_entry(mu, kappa, rule)
    lr, nesterov = scaling.sgd_lr(group["lr"], kappa), group["nesterov"]
    return Scaled(
        grad_factor=sign(group["maximize"]),
        weight_decay=group["weight_decay"],
        momentum=carry / entry if nesterov else carry,
        carry=carry,
        entry=entry,
        grad_weight=entry * (1.0 - group["dampening"]),
        nesterov=nesterov,
        lr=lr * entry if nesterov else lr,
        kappa=kappa,
    )


def at_kappa(group: Group) -> dict[str, Any]:
    """Torch's buffer takes a gradient in once, where this one takes it in ``entry`` times."""
    kappa, mu, rule = group["kappa"], group["momentum"], group["momentum_scaling"]
    return {
        "lr": scaling.sgd_lr(group["lr"], kappa) * scaling.momentum_entry(mu, kappa, rule),
        "momentum": scaling.momentum(mu, kappa, rule),
        "dampening": group["dampening"],
        "weight_decay": group["weight_decay"],
    }


def fold(hyper: Scaled, step: Any) -> Scalars:
    first = step <= hyper.kappa
    return Scalars(
        hyper.grad_factor,
        hyper.weight_decay,
        hyper.momentum,
        where(first, 0.0, hyper.carry),
        where(first, hyper.entry, hyper.grad_weight),
        hyper.nesterov,
        hyper.lr,
    )


def update(param: Values, grad: Values, states: Mapping[str, Values], c: Scalars) -> None:
    """``b <- carry*b + grad_weight*g``; ``p <- p - lr*(g + momentum*b if nesterov else b)``."""
    descend(param, directed(grad, param, c.grad_factor, c.weight_decay), states, c)


def descend(param: Values, grad: Values, states: Mapping[str, Values], c: Any) -> None:
    """Step along the gradient to descend; ``c`` has what :class:`Scalars` names of momentum."""
    if "momentum_buffer" in states:
        momentum_buffer = states["momentum_buffer"]
        momentum_buffer.mul_(c.carry).add_(grad, alpha=c.grad_weight)
        grad = grad.add(momentum_buffer, alpha=c.momentum) if c.nesterov else momentum_buffer
    param.sub_(grad, alpha=c.lr)


SGD = Rule(
    name="sgd",
    numbers=("lr", "momentum", "dampening", "weight_decay", "kappa"),
    flags=("nesterov", "maximize", "momentum_scaling"),
    choices=CHOICES,
    check=check,
    variants={"plain": (), "momentum": ("momentum_buffer",)},
    variant=variant,
    scale=scale,
    at_kappa=at_kappa,
    fold=fold,
    update=update,
    scalars=Scalars,
)
