"""Warns of averages that are read before they have forgotten the weights they began with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..rules.rule import ema_kappa
from .decay import decays

# Callers in these modules are not the user's code.
OWN = (
    *("fused_ema.ema.", "fused_ema.optim.", "fused_ema.extension."),
    *("contextlib", "torch._compile", "torch._dynamo."),
)
# Of ``1/(1 - rho)`` as a float, which may be above a whole number.
ROUNDING = 1e-9


class YoungAverageWarning(UserWarning):
    """An average is read that still consists mostly of the weights it began with."""


class Young(NamedTuple):
    """An average of constant decay that has seen less than ``1/(1 - rho)`` base steps."""

    ema_decay: float
    base_steps: float

    @property
    def needed(self) -> float:
        """The base steps after which it is young no more."""
        return 1.0 / (1.0 - self.ema_decay)

    @property
    def share(self) -> float:
        """How much of the average the weights that it began with make up: ``rho**base_steps``."""
        return float(self.ema_decay**self.base_steps)


def youngest(groups: Iterable[Mapping[str, Any]], index: int) -> Young | None:
    """The average ``index`` of the group that holds the most of its start; None if none is young.

    Before the first step an average is the weights themselves, and with ``rho = 1`` it never moves:
    neither counts. A schedule is the user's own answer, and does not count either.
    """
    found = []
    for group in groups:
        ema_decay = decays(group["ema_decay"])[index]
        if callable(ema_decay):
            continue
        kappa = float(group["kappa"])
        own = Young(float(ema_decay), float(group["base_steps"]) * ema_kappa(group, kappa) / kappa)
        begun, moves = own.base_steps > 0.0, 0.0 < own.ema_decay < 1.0
        if begun and moves and own.base_steps < own.needed * (1.0 - ROUNDING):
            found.append(own)
    return max(found, key=lambda own: own.share, default=None)


def warn(what: str, young: Young) -> None:
    """Warn of ``young``, in the name of the user's line that called ``what``."""
    ema_decay = f"{young.ema_decay:.8g}"
    warnings.warn(
        f"{what}: the average with ema_decay={ema_decay} is young: after {young.base_steps:,.4g} "
        f"base steps {100.0 * young.share:.0f} % of it is still the weights that it began with. "
        f"It needs about {young.needed:,.4g}, which is 1/(1 - ema_decay). For a "
        f"shorter run use ema_decay=WarmUpDecay({ema_decay}), which forgets them at once, or a "
        "smaller ema_decay",
        YoungAverageWarning,
        stacklevel=_of_the_user(),
    )


def _of_the_user() -> int:
    """The ``stacklevel``, for the caller, of the nearest line outside the library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(OWN):
        level, frame = level + 1, frame.f_back
    return level
