"""Folds the scalars of a step in float64, recomputing only what changed in a param group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from .backends.plan import Scalars
from .ema import decays, ema_weights, is_constant
from .rules import Rule

# Fields besides the rule's own that decide in which bucket a group's parameters are.
PLACING = ("ema_order", "foreach", "fused", "differentiable", "capturable")


class _Scaled(NamedTuple):
    """A param group's scalars before the step is folded in, and the fields they came from."""

    fields: tuple[Any, ...]
    place: tuple[Any, ...]
    kappa: float
    hyper: Any
    weights: tuple[float, ...] | None


class _Held:
    """A tensor on a device, remembered as what it is: its value is not looked at."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return other is self.tensor or (isinstance(other, _Held) and other.tensor is self.tensor)


class Folder:
    """Scalars of every param group, at the step at hand.

    ``refresh`` reads the groups once a step; calling the folder then gives a group's scalars after
    ``step`` base steps. A group whose fields have not changed keeps its scaled hyper-parameters.

    Args:
        rule: the optimizer's rule.
        scaled: a param group's hyper-parameters at its ``kappa``, by the rule; raises ValueError
            for a group that holds a bad value.

    Attributes:
        groups: the optimizer's param groups.
        kappas: ``kappa`` of every param group, NaN where it is a tensor on a device.
    """

    def __init__(self, rule: Rule, scaled: Callable[[Mapping[str, Any]], Any]) -> None:
        self._rule = rule
        self._scaled_hyper = scaled
        self._fields = itemgetter(*rule.hyper, "ema_decay", *PLACING)
        self.groups: Sequence[Mapping[str, Any]] = ()
        self._seen: list[tuple[Any, ...]] = []
        self._scaled: list[_Scaled] = []
        self.kappas: list[float] = []
        self._rows: dict[tuple[int, float | None], Scalars] = {}
        self._scheduled: dict[int, tuple[float, ...]] = {}

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Take in the groups' current fields; True if a parameter may belong to another bucket.

        Raises:
            ValueError: a field holds a bad value; nothing has been taken in.
        """
        self._rows.clear()
        self._scheduled.clear()
        self.groups = groups
        if self._seen == list(map(self._fields, groups)):
            return False
        known = self._scaled if len(self._scaled) == len(groups) else [None] * len(groups)
        scaled = [
            old if old is not None and old.fields == self._fields(group) else self._scale(group)
            for group, old in zip(groups, known, strict=True)
        ]
        moved = any(
            old is not new and (old is None or old.place != new.place)
            for old, new in zip(known, scaled, strict=True)
        )
        self._scaled = scaled
        self._seen = [new.fields for new in scaled]
        self.kappas = [new.kappa for new in scaled]
        return moved

    def _scale(self, group: Mapping[str, Any]) -> _Scaled:
        hyper, ema_decay = self._scaled_hyper(group), group["ema_decay"]
        kappa = plain(group["kappa"], group)
        return _Scaled(
            fields=_remembered(plain(self._fields(group), group)),
            place=(
                self._rule.states(group),
                len(decays(ema_decay)),
                *(group[field] for field in PLACING),
            ),
            kappa=math.nan if isinstance(kappa, Tensor) else kappa,
            hyper=hyper,
            weights=ema_weights(ema_decay, 0.0, kappa)
            if is_constant(ema_decay) and not isinstance(kappa, Tensor)
            else None,
        )

    def __call__(self, group: int, step: float | None) -> Scalars:
        """The rule's scalars after ``step`` base steps, empty for None, and the EMA weights."""
        row = self._rows.get((group, step))
        if row is None:
            scaled = self._scaled[group]
            scalars = () if step is None else self._rule.fold(scaled.hyper, step)
            row = self._rows[group, step] = (scalars, self.weights(group))
        return row

    def weights(self, group: int) -> tuple[float, ...]:
        """The EMA weights of a group at this step; a schedule is asked once."""
        scaled = self._scaled[group]
        if scaled.weights is not None:
            return scaled.weights
        if group not in self._scheduled:
            fields = self.groups[group]
            kappa = plain(fields["kappa"], fields)
            self._scheduled[group] = ema_weights(fields["ema_decay"], fields["base_steps"], kappa)
        return self._scheduled[group]


def scale(rule: Rule, group: Mapping[str, Any]) -> Any:
    """The rule's hyper-parameters at the group's ``kappa``, see :attr:`Rule.scale`."""
    return rule.scale({field: plain(group[field], group) for field in rule.hyper})


def plain(value: Any, group: Mapping[str, Any]) -> Any:
    """``value`` with tensors as numbers and lists as tuples: nothing that may change.

    In a capturable group tensors beside the parameters stay tensors: they are for the device.
    """
    if isinstance(value, Tensor):
        params = group.get("params") if group.get("capturable") else None
        # as given to a constructor or saved they may be anything: then the value is looked at once
        first = params[0] if isinstance(params, list) and params else None
        beside = isinstance(first, Tensor) and first.device.type == value.device.type
        return value if beside else value.item()
    if isinstance(value, tuple | list):
        return tuple(plain(entry, group) for entry in value)
    return value


def _remembered(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Held(value)
    return tuple(map(_remembered, value)) if isinstance(value, tuple) else value
