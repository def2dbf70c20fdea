"""Folds the scalars of a step in float64, recomputing only what changed in a param group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import index, itemgetter
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from ..dtypes import widest
from ..ema.decay import EmaDecay, decays, ema_rates
from ..ema.formats import is_too_slow, step_seed, warn_of_rounding
from ..rules.bias import follow_kappa
from ..rules.rule import Rule, ema_kappa, rule_kappa
from ..values import SIMPLE, as_given
from .backends.plan import Scalars
from .clock import ema_span

# Fields besides the rule's own that decide in which bucket a group's parameters are.
BUCKETING = (
    *("ema_order", "ema_format", "state_format", "master_weights", "ema_every"),
    *("foreach", "fused", "differentiable", "capturable"),
)
# Values that can be compared with others of them, and need no conversion.
KNOWN = {*SIMPLE, tuple, list, Tensor}

Group: TypeAlias = Mapping[str, Any]


class _Scaled(NamedTuple):
    """A param group's scalars before the step is folded in, and the fields they came from."""

    fields: tuple[Any, ...]
    bucketing: tuple[Any, ...]
    kappa: float
    advance: float
    hyper: Any
    ema_rates: tuple[float, ...] | None


class Checked(NamedTuple):
    """A param group without a bad value.

    Attributes:
        values: the rule's fields and ``ema_decay``, see :func:`fields_without_tensors`.
        hyper: the rule's hyper-parameters at the group's ``kappa``.
    """

    values: dict[str, Any]
    hyper: Any


Check: TypeAlias = Callable[[Group], Checked]


class _Held:
    """A tensor on a device, remembered as what it is: its value is not looked at."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return other is self.tensor or (isinstance(other, _Held) and other.tensor is self.tensor)


class Folder:
    """Scalars of every param group, at the step at hand.

    ``refresh`` reads the groups once a step, and warns once of averages that a format of 16 bits
    cannot follow where their decay is a number; calling the folder then gives a group's scalars
    after ``step`` base steps. A group whose fields have not changed keeps its scaled
    hyper-parameters.

    Args:
        rule: the optimizer's rule.

    Attributes:
        groups: the optimizer's param groups.
        kappas: ``kappa`` of every param group, NaN where it is a tensor on a device.
        advances: how many base steps of its rule a step of every group is: its ``kappa``, or 1
            where that drives the averages alone.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._averaged = True
        self._given = itemgetter(
            *rule.hyper, "ema_decay", "kappa_scales", "max_grad_norm", *BUCKETING
        )
        self._numbers = itemgetter(*rule.numbers, "ema_decay", "max_grad_norm", "ema_every")
        self.groups: Sequence[Group] = ()
        self._seen: list[tuple[Any, ...]] = []
        self._scaled: list[_Scaled] = []
        self.kappas: list[float] = []
        self.advances: list[float] = []
        self._asked: list[int] = []  # groups with schedules
        self._rows: dict[tuple[int, float | None], Scalars] = {}
        self._scheduled: dict[int, tuple[float, ...]] = {}
        self._warned: set[str] = set()

    def refresh(
        self, groups: Sequence[dict[str, Any]], check: Check, averaged: bool = True
    ) -> bool:
        """Take in the groups' current fields; True if a parameter may belong to another bucket.

        Args:
            groups: the optimizer's param groups.
            check: what a param group holds; raises ValueError for a bad value.
            averaged: whether averages move at this step; if not, there are no EMA rates.

        Raises:
            ValueError: a field holds a bad value; nothing has been taken in.
        """
        self._averaged = averaged
        self._rows.clear()
        self._scheduled.clear()
        self.groups = groups
        fields = list(map(self._fields, groups))
        if self._seen == fields:
            return False
        known = self._scaled if len(self._scaled) == len(groups) else [None] * len(groups)
        scaled = [
            old
            if old is not None and old.fields == given
            else self._scale(group, given, old, check)
            for group, given, old in zip(groups, fields, known, strict=True)
        ]
        self._warn(known, scaled)
        for group, new in zip(groups, scaled, strict=True):
            if group.get("beta_scaling") == "linear":
                follow_kappa(group, new.advance)
        moved = any(
            old is not new and (old is None or old.bucketing != new.bucketing)
            for old, new in zip(known, scaled, strict=True)
        )
        self._scaled = scaled
        self._seen = [new.fields for new in scaled]
        self.kappas = [new.kappa for new in scaled]
        self.advances = [new.advance for new in scaled]
        self._asked = [
            i
            for i, group in enumerate(groups)
            if any(map(callable, decays(group["ema_decay"]))) and not group["capturable"]
        ]
        return moved

    def _warn(self, known: Sequence[_Scaled | None], scaled: Sequence[_Scaled]) -> None:
        """Once a format, of averages that move too slowly for it."""
        if not self._averaged:
            return
        for group, old, new in zip(self.groups, known, scaled, strict=True):
            if old is not None and old.ema_rates is new.ema_rates:
                continue
            form = group["ema_format"]
            if form not in self._warned and is_too_slow(form, new.ema_rates):
                self._warned.add(form)
                warn_of_rounding(form, new.ema_rates or ())

    def _fields(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What is compared from step to step, without looking at a device."""
        if not KNOWN.issuperset(map(type, self._numbers(group))):
            group.update(as_given(group))  # the user has written it
        given: tuple[Any, ...] = self._given(group)
        return _remembered(without_tensors(given, group)) if group["capturable"] else given

    def _scale(
        self, group: dict[str, Any], given: tuple[Any, ...], old: _Scaled | None, check: Check
    ) -> _Scaled:
        count = len(self._rule.numbers)
        numbers, others = given[:count], given[count:]
        # what a capturable group holds may be a tensor where what was given is its value
        if (
            old is not None
            and not group["capturable"]
            and others == old.fields[count:]
            and all(map(_is_simple, numbers))
        ):
            return self._rescale(group, numbers, old)
        group.update(as_given(group))  # flags, too
        values, hyper = check(group)
        ema_decay, kappa = values["ema_decay"], values["kappa"]
        bucketing = others[-len(BUCKETING) :]
        known = math.nan if isinstance(kappa, Tensor) else kappa
        return _Scaled(
            fields=_remembered(
                (*values.values(), group["kappa_scales"], group["max_grad_norm"], *bucketing)
            ),
            bucketing=(self._rule.variant(group), len(decays(ema_decay)), *bucketing),
            kappa=known,
            advance=rule_kappa(group, known),
            hyper=hyper,
            ema_rates=_constant_rates(ema_decay, ema_kappa(group, kappa)),
        )

    def _rescale(self, group: Group, numbers: tuple[Any, ...], old: _Scaled) -> _Scaled:
        """As :meth:`_scale` where only numbers have changed: most groups, at every step."""
        self._rule.check(group)
        kappa = group["kappa"]
        same = kappa == old.kappa
        return _Scaled(
            fields=(*numbers, *old.fields[len(numbers) :]),
            bucketing=(self._rule.variant(group), *old.bucketing[1:]),
            kappa=kappa,
            advance=rule_kappa(group, kappa),
            hyper=self._rule.scaled(group),
            ema_rates=old.ema_rates
            if same
            else _constant_rates(group["ema_decay"], ema_kappa(group, kappa)),
        )

    def ask_schedules(self) -> None:
        """Ask for the step at hand, once: code of the user's, which runs before tensors are read.

        Raises:
            ValueError: a schedule returns a number outside ``[0, 1]``.
        """
        for group in self._asked:
            self.ema_rates(group)

    def __call__(self, group: int, step: float | None) -> Scalars:
        """The rule's scalars after ``step`` base steps, empty for None, and the EMA rates."""
        row = self._rows.get((group, step))
        if row is None:
            scaled = self._scaled[group]
            scalars = () if step is None else self._rule.fold(scaled.hyper, step)
            row = self._rows[group, step] = (scalars, self.ema_rates(group))
        return row

    def seed(self, group: int) -> int:
        """The seed of the random bits that round a group's averages at this step."""
        fields = self.groups[group]
        return int(step_seed(index(fields["rounding_seed"]), fields["base_steps"]))

    def ema_rates(self, group: int) -> tuple[float, ...]:
        """The EMA rates of a group at this step; a schedule is asked once."""
        if not self._averaged:
            return ()
        scaled, fields = self._scaled[group], self.groups[group]
        if scaled.ema_rates is not None and fields.get("ema_waited", 0.0) == 0.0:
            return scaled.ema_rates
        if group not in self._scheduled:
            ema_decay, kappa = (
                without_tensors(fields[name], fields) for name in ("ema_decay", "kappa")
            )
            self._scheduled[group] = ema_rates(ema_decay, *ema_span(fields, kappa))
        return self._scheduled[group]


def _constant_rates(ema_decay: EmaDecay, kappa: Any) -> tuple[float, ...] | None:
    """The EMA rates, None where they depend on the step or lie on a device."""
    numbers = (kappa, *decays(ema_decay))
    if any(callable(number) or isinstance(number, Tensor) for number in numbers):
        return None
    return ema_rates(ema_decay, 0.0, kappa)


def fields_without_tensors(rule: Rule, group: Group) -> dict[str, Any]:
    """The rule's fields of a param group and ``ema_decay``, as :func:`without_tensors` values.

    Raises:
        ValueError: a tensor requires grad where gradients do not reach it, or holds more than one
            element.
    """
    given = {name: group[name] for name in (*rule.hyper, "ema_decay")}
    for name, value in given.items():
        reached = group["differentiable"] and name not in ("kappa", "ema_decay")
        _check_tensors(name, value, reached)
    return {name: without_tensors(value, group) for name, value in given.items()}


def _is_simple(value: Any) -> bool:
    """Whether nothing of ``value`` is a tensor, as far as a look at the types tells."""
    kind = type(value)
    return kind in SIMPLE or (kind is tuple and all([type(entry) in SIMPLE for entry in value]))


def _check_tensors(field: str, value: Any, reached: bool) -> None:
    for tensor in value if isinstance(value, tuple | list) else (value,):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.requires_grad and not reached:
            raise ValueError(
                f"{field} requires grad, but is folded into float64 numbers; allowed: a number, or "
                "a tensor of one element that does not require grad (with differentiable=True "
                "gradients reach the rule's own numbers, not kappa and ema_decay)"
            )
        if tensor.numel() != 1:
            raise ValueError(
                f"{field} is a tensor of shape {tuple(tensor.shape)}; allowed: one element"
            )


def without_tensors(value: Any, group: Group) -> Any:
    """``value`` with tensors as numbers and lists as tuples: nothing that may change.

    In a capturable group tensors beside the parameters stay tensors: they are for the device. In
    a differentiable one those that require grad do, as new tensors of their device's widest dtype:
    each step's own graph.
    """
    if type(value) in SIMPLE:
        return value
    if isinstance(value, Tensor):
        if value.requires_grad and group.get("differentiable"):
            return value.to(widest(value.device)).reshape(())
        params = group.get("params") if group.get("capturable") else None
        # as given to a constructor or saved they may be anything: then the value is looked at once
        first = params[0] if isinstance(params, list) and params else None
        beside = isinstance(first, Tensor) and first.device.type == value.device.type
        return value if beside else value.item()
    if isinstance(value, tuple | list):
        return tuple(without_tensors(entry, group) for entry in value)
    return value


def _remembered(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Held(value)
    return tuple(map(_remembered, value)) if isinstance(value, tuple) else value
