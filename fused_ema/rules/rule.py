"""The optimizers' maths, once for Python: one :class:`Rule` each.

A rule turns a param group into float64 scalars in two stages, so that a step of an unchanged group
costs only its bias corrections: ``scale`` applies the batch-size rules of
:mod:`fused_ema.scaling`, ``fold`` folds in the step. ``update`` is the element-wise formula on
tensors, the specification that every kernel follows. A
:class:`~fused_ema.rules.tensorlist.TensorList` takes its place where no value is so large that a
square or a difference may overflow.
``csrc/rules.h`` holds the same formulas in C++ under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from .. import scaling
from ..realmath import expm1, log1p, sqrt, where
from . import blending
from .tensorlist import TensorList

Group = Mapping[str, Any]
Values = TypeVar("Values", Tensor, TensorList)


@dataclass(frozen=True)
class Rule:
    """One optimizer.

    Attributes:
        name: key of the kernels in every backend.
        numbers: param-group fields that ``states``, ``scale`` and ``check`` read: numbers, or
            tuples of them; a capturable group may hold tensors of its device there.
        flags: those of its fields that choose between formulas: bools and names.
        check: raises ValueError for a bad param group.
        states: names of the state tensors that a group needs, in the kernels' order.
        scale: hyper-parameters at the group's ``kappa``: float64, floats or tensors of one shape.
        fold: the kernels' scalars from ``scale``'s result and the base steps after this step.
        update: one step in place: ``update(param, grad, states, scalars)``; never writes ``grad``.
        scalars: the NamedTuple type that ``fold`` returns; its order is the kernels' table layout.
            The first of a rule that takes gradients is ``grad_factor``, which kernels also multiply
            by a step's own factor: one product for maximizing, unscaling and clipping.
    """

    name: str
    numbers: tuple[str, ...]
    flags: tuple[str, ...]
    check: Callable[[Group], None]
    states: Callable[[Group], tuple[str, ...]]
    scale: Callable[[Group], Any]
    fold: Callable[[Any, Any], Any]
    update: Callable[[Any, Any, Sequence[Any], Any], None]
    scalars: Any

    @property
    def hyper(self) -> tuple[str, ...]:
        """All param-group fields that the rule reads."""
        return (*self.numbers, *self.flags)


def ema_update(ema: Values, param: Values, weight: float) -> None:
    """``ema <- ema + weight * (param - ema)`` in place, with ``weight = 1 - rho**kappa``."""
    lerp_(ema, param, weight)


def lerp_(start: Values, end: Values, weight: float) -> None:
    """``start <- start + weight*(end - start)``, see :func:`~fused_ema.rules.blending.lerp`."""
    if isinstance(start, Tensor):
        start.copy_(blending.lerp(start, end, weight))
    else:
        start.lerp_(end, weight)


def lerp_square_(start: Values, value: Values, weight: float) -> None:
    """``start <- start + weight*(value*value - start)``, also where only its terms are finite."""
    if isinstance(start, Tensor):
        start.copy_(blending.lerp_square(start, value, weight))
    else:
        start.lerp_(value.mul(value), weight)


def decayed(change: Values, param: Values, decay: float) -> Values:
    """``change + decay*param``; of an infinite parameter ``change``, for it stays infinite."""
    if isinstance(change, Tensor):
        return change.add(param, alpha=decay).where(param.isfinite(), change)
    return change.add_(param, alpha=decay)


def directed(grad: Values, param: Values, grad_factor: float, weight_decay: float) -> Values:
    """The gradient to descend: ``grad_factor*g``, plus the L2 penalty ``weight_decay*p``."""
    if grad_factor != 1.0:
        grad = grad.mul(grad_factor)
    return grad.add(param, alpha=weight_decay) if counts(weight_decay) else grad


def counts(factor: Any) -> bool:
    """Whether a term with this factor does: of a tensor that gradients reach also where it is 0."""
    return isinstance(factor, Tensor) or factor != 0.0


def sign(maximize: bool) -> float:
    """The direction to go in, a factor of the gradient."""
    return -1.0 if maximize else 1.0


class NoScalars(NamedTuple):
    """Nothing to fold."""


def check_frozen(group: Group) -> None:
    scaling.check_kappa(group["kappa"])
    if group["ema_format"] == "delta":
        raise ValueError(
            "ema_format='delta': another optimizer moves the weights, so that a difference to them "
            "means another average; allowed: 'full', 'bf16'"
        )


# Parameters that no rule moves; their averages still follow them.
FROZEN = Rule(
    name="frozen",
    numbers=("kappa",),
    flags=(),
    check=check_frozen,
    states=lambda group: (),
    scale=lambda hyper: None,
    fold=lambda hyper, step: NoScalars(),
    update=lambda param, grad, states, scalars: None,
    scalars=NoScalars,
)


class SgdScaled(NamedTuple):
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


class SgdScalars(NamedTuple):
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


def check_sgd(group: Group) -> None:
    check_shared(group)
    scaling.check_range("momentum", group["momentum"], 0.0, math.inf)
    check_choice("momentum_scaling", group["momentum_scaling"], ("none", "exact"))
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True requires momentum > 0 and dampening = 0; received "
            f"momentum={group['momentum']}, dampening={group['dampening']}"
        )


def sgd_states(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def scale_sgd(group: Group) -> SgdScaled:
    """The buffer is kept in units of the base batch: ``entry`` times that of a run at ``kappa``.

    Under a constant gradient it tends to ``g/(1 - mu)`` at every ``kappa``, so that it means the
    same before and after a change.
    """
    kappa, mu, rule = group["kappa"], group["momentum"], group["momentum_scaling"]
    carry, entry = scaling.momentum(mu, kappa, rule), scaling.momentum_entry(mu, kappa, rule)
    lr, nesterov = scaling.sgd_lr(group["lr"], kappa), group["nesterov"]
    return SgdScaled(
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


def fold_sgd(hyper: SgdScaled, step: Any) -> SgdScalars:
    first = step <= hyper.kappa
    return SgdScalars(
        hyper.grad_factor,
        hyper.weight_decay,
        hyper.momentum,
        where(first, 0.0, hyper.carry),
        where(first, hyper.entry, hyper.grad_weight),
        hyper.nesterov,
        hyper.lr,
    )


def update_sgd(param: Values, grad: Values, states: Sequence[Values], c: SgdScalars) -> None:
    """``b <- carry*b + grad_weight*g``; ``p <- p - lr*(g + momentum*b if nesterov else b)``."""
    grad = directed(grad, param, c.grad_factor, c.weight_decay)
    if states:
        (momentum_buffer,) = states
        momentum_buffer.mul_(c.carry).add_(grad, alpha=c.grad_weight)
        grad = grad.add(momentum_buffer, alpha=c.momentum) if c.nesterov else momentum_buffer
    param.sub_(grad, alpha=c.lr)


SGD = Rule(
    name="sgd",
    numbers=("lr", "momentum", "dampening", "weight_decay", "kappa"),
    flags=("nesterov", "maximize", "momentum_scaling"),
    check=check_sgd,
    states=sgd_states,
    scale=scale_sgd,
    fold=fold_sgd,
    update=update_sgd,
    scalars=SgdScalars,
)


class AdamScaled(NamedTuple):
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


class AdamScalars(NamedTuple):
    """``weight1``, ``weight2`` are 1 - beta; ``step_size``, ``eps`` hold the bias corrections."""

    grad_factor: float
    weight_decay: float
    decay: float
    weight1: float
    weight2: float
    step_size: float
    eps: float


def check_adam(group: Group) -> None:
    check_shared(group)
    check_choice("beta_scaling", group["beta_scaling"], ("exponential", "linear"))
    check_choice("weight_decay_scaling", group["weight_decay_scaling"], ("exact", "none"))
    scaling.check_range("eps", group["eps"], 0.0, math.inf)
    if not isinstance(group["betas"], tuple) or len(group["betas"]) != 2:
        raise ValueError(f"betas={group['betas']!r} is not known; allowed: two numbers")
    for i, beta in enumerate(group["betas"]):
        scaling.check_range(f"betas[{i}]", beta, 0, 1, ends=("<=", "<"))


def adam_states(group: Group) -> tuple[str, ...]:
    states = ("exp_avg", "exp_avg_sq")
    return (*states, "max_exp_avg_sq") if group["amsgrad"] else states


def scale_adam(group: Group) -> AdamScaled:
    kappa, base_lr, weight_decay = group["kappa"], group["lr"], group["weight_decay"]
    lr = scaling.adaptive_lr(base_lr, kappa)
    decoupled = group["decoupled_weight_decay"]
    weights = [scaling.beta_weight(beta, kappa, group["beta_scaling"]) for beta in group["betas"]]
    log_betas = [log1p(-weight) / kappa for weight in weights]
    return AdamScaled(
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


def fold_adam(hyper: AdamScaled, step: Any) -> AdamScalars:
    """Fold ``1 - beta**step`` in: ``step_size*m/(sqrt(v) + eps)`` is Adam's corrected form."""
    bias_correction1 = -expm1(step * hyper.log_beta1)
    bias_correction2_sqrt = sqrt(-expm1(step * hyper.log_beta2))
    return AdamScalars(
        hyper.grad_factor,
        hyper.weight_decay,
        hyper.decay,
        hyper.weight1,
        hyper.weight2,
        hyper.lr * bias_correction2_sqrt / bias_correction1,
        hyper.eps * bias_correction2_sqrt,
    )


def update_adam(param: Values, grad: Values, states: Sequence[Values], c: AdamScalars) -> None:
    """``p <- p - (decay*p + step_size*m/(sqrt(v) + eps))``.

    Kingma & Ba 2015; amsgrad: Reddi et al. 2018; decay: Loshchilov & Hutter 2019.
    """
    exp_avg, exp_avg_sq = states[:2]
    grad = directed(grad, param, c.grad_factor, c.weight_decay)
    lerp_(exp_avg, grad, c.weight1)
    lerp_square_(exp_avg_sq, grad, c.weight2)
    if len(states) == 3:
        exp_avg_sq = states[2].clamp_min_(exp_avg_sq)
    change = exp_avg.mul(c.step_size).div(exp_avg_sq.sqrt().add(c.eps))
    if counts(c.decay):
        change = decayed(change, param, c.decay)
    param.sub_(change)


ADAM = Rule(
    name="adam",
    numbers=("lr", "betas", "eps", "weight_decay", "kappa"),
    flags=(
        *("decoupled_weight_decay", "amsgrad", "maximize"),
        *("beta_scaling", "weight_decay_scaling"),
    ),
    check=check_adam,
    states=adam_states,
    scale=scale_adam,
    fold=fold_adam,
    update=update_adam,
    scalars=AdamScalars,
)


def check_shared(group: Group) -> None:
    scaling.check_kappa(group["kappa"])
    scaling.check_range("lr", group["lr"], 0.0, math.inf)
    scaling.check_range("weight_decay", group["weight_decay"], 0.0, math.inf)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")
