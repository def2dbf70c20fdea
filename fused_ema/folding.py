"""Folds the scalars of a step in float64, recomputing only what changed in a param group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from .backends.plan import Scalars
from .ema import check_ema_decay, decays, ema_weights, is_constant
from .rules import Rule

# Fields besides the rule's own that decide in which bucket a group's parameters are.
PLACING = ("ema_order", "foreach", "fused", "differentiable")


class Folder:
    """Scalars of every param group, at the step at hand.

    ``refresh`` reads the groups once a step; calling the folder then gives a group's scalars after
    ``step`` base steps. A group whose fields have not changed keeps its scaled hyper-parameters.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._fields = itemgetter(*rule.hyper, "ema_decay", *PLACING)
        self._groups: Sequence[Mapping[str, Any]] = ()
        self._seen: list[Any] = []
        self._places: list[Any] = []
        self._scaled: list[Any] = []
        self._weights: list[tuple[float, ...] | None] = []
        self._rows: dict[tuple[int, float | None], Scalars] = {}
        self.kappas: list[float] = []

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Take in the groups' current fields; True if a parameter may belong to another bucket.

        Raises:
            ValueError: a field holds a bad value.
        """
        self._groups = groups
        self._rows.clear()
        if len(groups) != len(self._seen):
            self._seen = [None] * len(groups)
            self._places = [None] * len(groups)
            self._scaled = [None] * len(groups)
            self._weights = [None] * len(groups)
            self.kappas = [0.0] * len(groups)
        moved = False
        try:
            for i, group in enumerate(groups):
                if self._fields(group) != self._seen[i]:
                    moved |= self._rescale(i, group)
        except Exception:
            # the groups read so far would not be found changed again
            self._seen = []
            raise
        return moved

    def _rescale(self, i: int, group: Mapping[str, Any]) -> bool:
        self._rule.check(group)
        check_ema_decay(group["ema_decay"])
        kappa = float(group["kappa"])
        self._scaled[i] = self._rule.scale(group)
        self._weights[i] = (
            ema_weights(group["ema_decay"], 0.0, kappa) if is_constant(group["ema_decay"]) else None
        )
        self.kappas[i] = kappa
        # a tensor is remembered by value: in-place changes of a tensor lr must be seen
        self._seen[i] = plain(self._fields(group))
        place = (
            self._rule.states(group),
            len(decays(group["ema_decay"])),
            *(group[field] for field in PLACING),
        )
        moved = place != self._places[i]
        self._places[i] = place
        return moved

    def __call__(self, group: int, step: float | None) -> Scalars:
        """The rule's scalars after ``step`` base steps, empty for None, and the EMA weights."""
        row = self._rows.get((group, step))
        if row is None:
            scalars: tuple[float, ...] = ()
            if step is not None:
                scalars = self._rule.fold(self._scaled[group], step)
            row = self._rows[group, step] = (scalars, self._weights_now(group))
        return row

    def _weights_now(self, group: int) -> tuple[float, ...]:
        weights = self._weights[group]
        if weights is None:
            fields = self._groups[group]
            weights = ema_weights(fields["ema_decay"], fields["base_steps"], self.kappas[group])
        return weights


def plain(value: Any) -> Any:
    """``value`` with every tensor replaced by its number, also inside tuples."""
    if isinstance(value, Tensor):
        return value.item()
    return tuple(map(plain, value)) if isinstance(value, tuple) else value
