"""LAMB: Adam's normalized mean and decay, as long as the parameter."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
from tolerances import (
    FOLD,
    LAMB_DECAY,
    LAMB_SUM,
    LAMB_UPDATE,
    RATIO,
    WEIGHT_SUM,
    Bounds,
    ratio_bound,
)

from . import Array, OracleState
from .adam import Adam, AdamScalars, update_bound


@dataclass(frozen=True, kw_only=True)
class LambScalars(AdamScalars):
    """`decay` is the coefficient of the weights beside the normalized mean."""

    decay: float


@dataclass(frozen=True)
class Lamb(Adam):
    state_names = ("exp_avg", "exp_avg_sq")
    elementwise = False

    eps: float = 1e-6
    adapt: bool = True

    def scale(self, clock: float) -> LambScalars:
        scalars = {**asdict(super().scale(clock)), "l2": 0.0}
        return LambScalars(**scalars, decay=math.sqrt(self.kappa) * self.weight_decay)

    def direction(self, scalars: LambScalars, state: OracleState, after: OracleState) -> Array:
        return self.normalized(scalars, after) + scalars.decay * state.param

    def ratio(self, state: OracleState, direction: Array) -> float:
        weight, length = np.linalg.norm(state.param), np.linalg.norm(direction)
        if not self.adapt or weight == 0 or length == 0:
            return 1.0
        return weight / length

    def update(self, scalars: LambScalars, state: OracleState, g: Array) -> OracleState:
        after = self.with_moments(scalars, state, g)
        direction = self.direction(scalars, state, after)
        step = scalars.lr * self.ratio(state, direction) * direction
        return replace(after, param=state.param - step)

    def bounds(
        self, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g: Array
    ) -> Bounds:
        scalars = self.scale(state.clock)
        moments, root_error = self.moment_bounds(state, after, incoming, unit, g)
        of_one = replace(scalars, lr=1.0)
        _, error = update_bound(of_one, after, moments["exp_avg"], root_error, unit)
        direction = self.direction(scalars, state, after)
        if scalars.decay:
            rounding = LAMB_DECAY * scalars.decay * np.abs(state.param)
            rounding = rounding + LAMB_SUM * np.abs(direction)
            error = error + scalars.decay * incoming.param + unit * rounding
        ratio = self.ratio(state, direction)
        relative = LAMB_UPDATE * unit + FOLD
        if self.adapt and ratio != 1.0:
            relative += RATIO * unit + ratio_bound(state.param, incoming.param, direction, error)
        step = scalars.lr * ratio
        param = incoming.param + step * (error + relative * np.abs(direction))
        param = param + unit * WEIGHT_SUM * np.abs(after.param)
        return incoming.with_errors(param, **moments)
