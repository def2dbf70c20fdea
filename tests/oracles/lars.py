"""LARS: SGD by gradients whose length is that of their parameter."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from tolerances import (
    GRADIENT_DECAY,
    GRADIENT_SUM,
    LARS_NORM,
    LARS_PRODUCT,
    RATIO,
    Bounds,
    ratio_bound,
)

from . import Array, OracleState
from .sgd import Sgd, SgdScalars


@dataclass(frozen=True, kw_only=True)
class LarsScalars(SgdScalars):
    """`decay` is the penalty's coefficient, which enters the ratio, too."""

    decay: float


@dataclass(frozen=True)
class Lars(Sgd):
    late_states = ()  # nothing dampens a first gradient
    elementwise = False

    momentum: float = 0.9
    trust_coefficient: float = 1e-3
    eps: float = 1e-8
    adapt: bool = True

    def initial_states(self, zero: Array) -> dict[str, Array]:
        return {"momentum_buffer": zero} if self.momentum else {}

    def scale(self, clock: float) -> LarsScalars:
        scalars = super().scale(clock)
        return LarsScalars(**{**asdict(scalars), "l2": 0.0}, decay=scalars.l2)

    def ratio(self, scalars: LarsScalars, state: OracleState, g: Array) -> float:
        weight, gradient = np.linalg.norm(state.param), np.linalg.norm(g)
        if not self.adapt or weight == 0 or gradient == 0:
            return 1.0
        return self.trust_coefficient * weight / (gradient + scalars.decay * weight + self.eps)

    def descent(self, scalars: LarsScalars, state: OracleState, g: Array) -> Array:
        return self.ratio(scalars, state, g) * (g + scalars.decay * state.param)

    def update(self, scalars: LarsScalars, state: OracleState, g: Array) -> OracleState:
        return super().update(scalars, state, self.descent(scalars, state, g))

    def bounds(
        self, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g: Array
    ) -> Bounds:
        """The ratio's relative error is at most that of |p| / |g|: the rest only adds to both."""
        scalars = self.scale(state.clock)
        ratio, descent = self.ratio(scalars, state, g), self.descent(scalars, state, g)
        error = np.zeros_like(g)
        if scalars.decay:
            error = scalars.decay * incoming.param + unit * GRADIENT_SUM * np.abs(descent / ratio)
            error = error + unit * GRADIENT_DECAY * scalars.decay * np.abs(state.param)
        error = ratio * error
        if self.adapt and ratio != 1.0:
            relative = ratio_bound(state.param, incoming.param, g, LARS_NORM * unit * g)
            error = error + (relative + (RATIO + LARS_PRODUCT) * unit) * np.abs(descent)
        return self.descent_bounds(state, after, incoming, unit, descent, error)
