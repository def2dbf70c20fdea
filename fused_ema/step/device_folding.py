"""Folds the scalars of a bucket's slots where they are used, so that a captured graph goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checks import check_range
from ..ema.decay import decay_at, decays
from ..ema.formats import step_seed
from ..rules.rule import Rule
from ..scaling import decay_weight

Group: TypeAlias = Mapping[str, Any]
Name: TypeAlias = tuple[str, int]  # a field, and which of its numbers

# What the seed of a step is made from.
SEEDING = ("rounding_seed", "base_steps")


@dataclass(frozen=True)
class Run:
    """Successive slots whose groups agree in everything that is no number: they fold together."""

    begin: int
    end: int
    flags: dict[str, Any]


class DeviceFolder:
    """The scalars of every slot of a capturable bucket, folded in float64 on its device.

    The formulas are the rule's own ``scale`` and ``fold``, on one tensor over the slots instead of
    a float. Numbers of the param groups are constants of what is captured; tensors that lie on the
    device, and what a schedule gives for the device's count of base steps, are read at every run.

    Args:
        rule: the bucket's rule.
        groups: index of each slot's param group, ascending.
        num_emas: how many averages each slot has.
        rounds: whether a step takes random bits.
        counters: base steps of the slots, float64 on the device, in one or several tensors that
            are counted in place.

    Attributes:
        table: a row a slot: the rule's scalars, a weight per average and, where the step takes
            random bits, its seed; float64.
    """

    def __init__(
        self,
        rule: Rule,
        groups: Sequence[int],
        num_emas: int,
        rounds: bool,
        counters: Sequence[Tensor],
    ) -> None:
        self._rule = rule
        self._num_emas = num_emas
        self._rounds = rounds
        self._fields = (*rule.numbers, "ema_decay", *(SEEDING if rounds else ()))
        sizes = dict(sorted(Counter(groups).items()))
        self._indices, self._sizes = list(sizes), list(sizes.values())
        self._counters = counters
        self._steps = torch.cat(list(counters)) if len(counters) > 1 else counters[0]
        places = {index: place for place, index in enumerate(self._indices)}
        column = [places[group] for group in groups]
        self._column = torch.tensor(column, device=self._steps.device)
        self._flags: list[dict[str, Any]] = []
        self._names: list[Name] = []
        self._numbers: list[list[Any]] = []
        self._known: list[list[float | None]] = []
        self._inputs = self._steps.new_empty(0)
        self._constants: dict[float, Tensor] = {}
        width = len(rule.scalars._fields) + num_emas + rounds
        self.table = self._steps.new_zeros(len(groups), width)

    @torch.no_grad()
    def prepare(self, groups: Sequence[Group]) -> None:
        """Look at the optimizer's param groups and ask schedules; count and write nothing.

        Raises:
            ValueError: a schedule returns a number outside ``[0, 1]``. A tensor on the device is
                not looked at.
        """
        taken = [groups[index] for index in self._indices]
        self._flags = [{name: group[name] for name in self._rule.flags} for group in taken]
        self._names = _names(self._fields, taken[0])
        self._numbers = [[self._number(group, name) for group in taken] for name in self._names]

    @torch.no_grad()
    def run(self, active: Sequence[bool], capturing: bool, control: Tensor | None) -> None:
        """Count the prepared step and fold :attr:`table`, by operations on the device alone.

        What earlier runs brought there is not used by a graph, nor what a graph brings by others:
        a captured operation is not carried out yet, and may be at any time.

        Args:
            active: which slots have a gradient: their steps are counted.
            capturing: whether a graph is being captured.
            control: see :class:`~fused_ema.step.backends.plan.Plan`.
        """
        if capturing:
            self._forget()
        self._fold(active, control)
        if capturing:
            self._forget()

    @property
    def kept(self) -> list[Tensor]:
        """What runs read on the device, beside the counters and the groups' own tensors."""
        return [self.table, self._steps, self._column, self._inputs, *self._constants.values()]

    def _forget(self) -> None:
        self._known.clear()
        self._constants.clear()
        self._inputs = self._steps.new_empty(0)

    def _fold(self, active: Sequence[bool], control: Tensor | None) -> None:
        self._read(self._numbers)
        of_slots = self._inputs.index_select(1, self._column)
        inputs = dict(zip(self._names, of_slots, strict=True))
        kappa = inputs["kappa", 0]
        self._count(active, kappa if control is None else kappa * (control[1] == 0.0))
        for run in self._runs():
            part = {name: value[run.begin : run.end] for name, value in inputs.items()}
            columns = [*self._scalars(run, part), *self._weights(part)]
            if self._rounds:
                seed, count = (part[field, 0] for field in SEEDING)
                columns.append(step_seed(seed.long(), count).double())
            rows = self.table[run.begin : run.end]
            if columns:
                torch.stack([self._tensor(c, rows) for c in columns], dim=1, out=rows)

    def _count(self, active: Sequence[bool], kappa: Tensor) -> None:
        apart = len(self._counters) > 1
        if apart:
            torch.cat(list(self._counters), out=self._steps)
        for begin, end in _true_runs(active):
            self._steps[begin:end].add_(kappa[begin:end])
        if apart:
            sizes = [len(counters) for counters in self._counters]
            torch._foreach_copy_(list(self._counters), list(self._steps.split(sizes)))

    def _number(self, group: Group, name: Name) -> Any:
        """A float, or a tensor on the device: the user's, or what a schedule gives there."""
        field, position = name
        value = decay_at(_values(group, field)[position], group["base_steps"], group["kappa"])
        if isinstance(value, Tensor) and value.device.type == self._steps.device.type:
            return value
        if field == "ema_decay":
            check_range(field, value, 0.0, 1.0)
        return float(value)

    def _read(self, rows: list[list[Any]]) -> None:
        """Bring the groups' numbers to the device: a row a number, a column a group."""
        if self._inputs.numel() == 0:
            self._inputs = self._steps.new_empty(len(rows), len(rows[0]))
            self._known = [[None] * len(row) for row in rows]
        tensors = [
            (held, value.detach().reshape(()))
            for inputs, row in zip(self._inputs, rows, strict=True)
            for held, value in zip(inputs, row, strict=True)
            if isinstance(value, Tensor)
        ]
        if tensors:
            held, given = zip(*tensors, strict=True)
            torch._foreach_copy_(held, given)
        known = [[None if isinstance(value, Tensor) else value for value in row] for row in rows]
        for inputs, row, old in zip(self._inputs, known, self._known, strict=True):
            _fill(inputs, row, old)
        self._known = known

    def _runs(self) -> list[Run]:
        runs, begin = [], 0
        sized = zip(self._flags, self._sizes, strict=True)
        for flags, members in groupby(sized, key=lambda member: member[0]):
            end = begin + sum(size for _, size in members)
            runs.append(Run(begin, end, flags))
            begin = end
        return runs

    def _scalars(self, run: Run, part: Mapping[Name, Tensor]) -> tuple[Any, ...]:
        fields: dict[str, Any] = dict(run.flags)
        for field in self._rule.numbers:
            values = [value for (name, _), value in part.items() if name == field]
            fields[field] = tuple(values) if (field, 1) in part else values[0]
        scaled = self._rule.scale(fields)
        folded: tuple[Any, ...] = self._rule.fold(scaled, self._steps[run.begin : run.end])
        return folded

    def _weights(self, part: Mapping[Name, Tensor]) -> list[Tensor]:
        kappa = part["kappa", 0]
        return [decay_weight(part["ema_decay", k], kappa) for k in range(self._num_emas)]

    def _tensor(self, value: Any, rows: Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        # kept, because making it would be a launch of every step
        if float(value) not in self._constants:
            self._constants[float(value)] = self._steps.new_full(self._steps.shape, float(value))
        return self._constants[float(value)][: len(rows)]


def _true_runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    runs, begin = [], 0
    for flag, members in groupby(flags):
        end = begin + len(list(members))
        if flag:
            runs.append((begin, end))
        begin = end
    return runs


def _names(fields: Sequence[str], group: Group) -> list[Name]:
    """The fields that hold numbers; a field of several is named by each of its positions."""
    return [(field, i) for field in fields for i in range(len(_values(group, field)))]


def _values(group: Group, field: str) -> tuple[Any, ...]:
    if field == "ema_decay":
        return decays(group[field])
    value = group[field]
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _fill(inputs: Tensor, row: list[float | None], known: list[float | None]) -> None:
    """Write the floats that are new, at once where all are the same."""
    if row == known:
        return
    if row[0] is not None and row.count(row[0]) == len(row):
        inputs.fill_(row[0])
        return
    for held, value, old in zip(inputs, row, known, strict=True):
        if value is not None and value != old:
            held.fill_(value)
