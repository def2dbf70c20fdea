"""The optimizers' maths, once for Python: one :class:`Rule` each.

A rule turns a param group into float64 scalars in two stages, so that a step of an unchanged group
costs only its bias corrections: ``scale`` applies the batch-size rules of
:mod:`fused_ema.scaling`, ``fold`` folds in the step. ``update`` is the element-wise formula on
tensors, the specification that every kernel follows. A
:class:`~fused_ema.rules.tensorlist.TensorList` takes its place where no value is so large that a
square or a difference may overflow.
``csrc/rules`` holds the same formulas in C++ under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from torch import Tensor

from ..checks import check_choice, check_kappa, check_range
from . import blending
from .tensorlist import TensorList

Group = Mapping[str, Any]
Values = TypeVar("Values", Tensor, TensorList)


# Fields that hold several numbers, and how many.
POSITIONS = {"betas": 2}


def _positions(field: str) -> tuple[str, ...]:
    count = POSITIONS.get(field)
    return (field,) if count is None else tuple(f"{field}[{i}]" for i in range(count))


@dataclass(frozen=True, eq=False)
class Rule:
    """One optimizer.

    Attributes:
        name: with ``variant`` the key of the kernels in every backend.
        numbers: param-group fields that ``variant``, ``scale`` and ``check`` read: numbers, or
            tuples of them; a capturable group may hold tensors of its device there.
        flags: those of its fields that choose between formulas: bools, and names of two formulas.
        choices: the ``Literal`` of the names that such a field may hold.
        check: raises ValueError for a bad param group.
        variants: the kernels of the rule by name, and the names of the state tensors that each
            keeps, in the kernels' order.
        variant: which of them a group needs.
        scale: hyper-parameters at the group's ``kappa``: float64, floats or tensors of one shape.
        at_kappa: the same for people: ``numbers`` without ``kappa``, with the values that give
            torch's namesake the same steps. It takes floats alone.
        fold: the kernels' scalars from ``scale``'s result and the base steps after this step.
        update: one step in place: ``update(param, grad, states, scalars)``; never writes ``grad``.
            ``states`` are those of the variant, by name.
        scalars: the NamedTuple type that ``fold`` returns; its order is the kernels' table layout.
            The first of a rule that takes gradients is ``grad_factor``, which kernels also multiply
            by a step's own factor: one product for maximizing, unscaling and clipping. The last of
            a rule that takes norms is ``trust``: 1 where a group adapts its steps to them, else 0.
    """

    name: str
    numbers: tuple[str, ...]
    flags: tuple[str, ...]
    choices: Mapping[str, Any]
    check: Callable[[Group], None]
    variants: Mapping[str, tuple[str, ...]]
    variant: Callable[[Group], str]
    scale: Callable[[Group], Any]
    at_kappa: Callable[[Group], dict[str, Any]]
    fold: Callable[[Any, Any], Any]
    update: Callable[[Any, Any, Mapping[str, Any], Any], None]
    scalars: Any

    def states(self, group: Group) -> tuple[str, ...]:
        """Names of the state tensors that a group needs, in the kernels' order."""
        return self.variants[self.variant(group)]

    @property
    def takes_norms(self) -> bool:
        """Whether a step needs the trust ratio of each parameter, whose place is the last scalar.

        See :mod:`fused_ema.rules.trust`.
        """
        return bool(self.scalars._fields[-1:] == ("trust",))

    @property
    def hyper(self) -> tuple[str, ...]:
        """All param-group fields that the rule reads."""
        return (*self.numbers, *self.flags)

    @property
    def number_names(self) -> tuple[str, ...]:
        """The numbers as device kernels count them: each position of a field has its own."""
        return tuple(name for field in self.numbers for name in _positions(field))

    def scaled(self, group: Group) -> Any:
        """The result of ``scale`` at the ``kappa`` that drives the optimizer."""
        kappa = rule_kappa(group, group["kappa"])
        return self.scale(group if kappa is group["kappa"] else {**group, "kappa": kappa})

    @property
    def flag_names(self) -> tuple[str, ...]:
        """What the bits of :meth:`flag_bits` stand for: a field, or its second name."""
        return tuple(
            f"{flag}={get_args(self.choices[flag])[1]}" if flag in self.choices else flag
            for flag in self.flags
        )

    def flag_bits(self, group: Group) -> int:
        """A bit a flag, the first the lowest: set where a bool is True, or for the second name."""
        return sum(self._is_set(flag, group[flag]) << k for k, flag in enumerate(self.flags))

    def _is_set(self, flag: str, value: Any) -> bool:
        choices = self.choices.get(flag)
        return bool(value) if choices is None else value == get_args(choices)[1]


def rule_kappa(group: Group, kappa: Any) -> Any:
    """The ``kappa`` that drives a group's optimizer: its own, or 1 beside averages alone."""
    return 1.0 if group["kappa_scales"] == "ema" else kappa


def ema_kappa(group: Group, kappa: Any) -> Any:
    """The ``kappa`` that drives a group's averages: its own, or 1 beside an optimizer alone."""
    return 1.0 if group["kappa_scales"] == "optimizer" else kappa


def ema_update(ema: Values, param: Values, rate: float) -> None:
    """``ema <- ema + rate * (param - ema)`` in place, with the EMA rate ``1 - rho**kappa``."""
    lerp_(ema, param, rate)


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
    return grad.add(param, alpha=weight_decay) if matters(weight_decay) else grad


def matters(factor: Any) -> bool:
    """Whether a term with this factor does: of a tensor that gradients reach also where it is 0."""
    return isinstance(factor, Tensor) or factor != 0.0


def sign(maximize: bool) -> float:
    """The direction to go in, a factor of the gradient."""
    return -1.0 if maximize else 1.0


def check_shared(group: Group) -> None:
    check_kappa(group["kappa"])
    check_range("lr", group["lr"], 0.0, math.inf)
    check_range("weight_decay", group["weight_decay"], 0.0, math.inf)


def check_choices(group: Group, choices: Mapping[str, Any]) -> None:
    """Raise ValueError unless each field holds one of its ``Literal``'s names."""
    for name, allowed in choices.items():
        check_choice(name, group[name], allowed)
