"""SGD: Nesterov's and plain momentum, dampening, L2 penalty."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tolerances import (
    BUFFER_NEW,
    BUFFER_OLD,
    BUFFER_SUM,
    FOLD,
    SGD_UPDATE,
    WEIGHT_SUM,
    Bounds,
    gradient_bound,
)

from . import Array, OracleConfig, OracleState, Scalars


@dataclass(frozen=True, kw_only=True)
class SgdScalars(Scalars):
    """`buffer_units` is a step's own buffer over the stored one of the base batch."""

    momentum: float
    buffer_units: float
    gradient_weight: float


@dataclass(frozen=True)
class Sgd(OracleConfig):
    state_names = ("momentum_buffer",)
    late_states = ("momentum_buffer",)

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    momentum_scaling: str = "none"

    def initial_states(self, zero: Array) -> dict[str, Array]:
        return {}

    def scale(self, clock: float) -> SgdScalars:
        """A step's own buffer tends to g / (1 - mu^kappa), the base batch's to g / (1 - mu)."""
        momentum, units = self.momentum, 1.0
        if self.momentum_scaling == "exact":
            momentum = self.momentum**self.kappa
            units = (1 - self.momentum) / (1 - momentum)
        return SgdScalars(
            lr=self.kappa * self.lr / units,
            l2=self.weight_decay,
            momentum=momentum,
            buffer_units=units,
            gradient_weight=1 - self.dampening,
            ema_weights=self.ema_weights(clock),
        )

    def direction(
        self, scalars: SgdScalars, state: OracleState, g: Array
    ) -> tuple[Array, Array | None]:
        """The direction of a step and the buffer to store (its first gradient is undamped)."""
        if self.momentum == 0:
            return g, None
        buffer, stored = g, state.states["momentum_buffer"]
        if stored is not None:
            old = scalars.buffer_units * stored
            buffer = scalars.momentum * old + scalars.gradient_weight * g
        direction = g + scalars.momentum * buffer if self.nesterov else buffer
        return direction, buffer / scalars.buffer_units

    def update(self, scalars: SgdScalars, state: OracleState, g: Array) -> OracleState:
        direction, buffer = self.direction(scalars, state, g)
        after = replace(state, param=state.param - scalars.lr * direction)
        return after.with_states(momentum_buffer=buffer)

    def bounds(
        self, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g: Array
    ) -> Bounds:
        g_error = gradient_bound(self.scale(state.clock), state, g, incoming, unit)
        return self.descent_bounds(state, after, incoming, unit, g, g_error)

    def descent_bounds(
        self,
        state: OracleState,
        after: OracleState,
        incoming: Bounds,
        unit: float,
        g: Array,
        g_error: Array,
    ) -> Bounds:
        """Bounds after a step along `g`, which is off by `g_error`."""
        scalars = self.scale(state.clock)
        mu, units = scalars.momentum, scalars.buffer_units
        entry = 1 / units
        fold = 0.0 if units == 1 else FOLD * (1 / (1 - mu) + 1 / (1 - self.momentum))
        direction, buffer = self.direction(scalars, state, g)
        error = buffer_error = g_error
        stored = state.states["momentum_buffer"]
        if buffer is not None and (stored is not None or units != 1):
            old = 0.0 if stored is None else mu * np.abs(stored)
            new = entry if stored is None else entry * abs(scalars.gradient_weight)
            rounding = BUFFER_OLD * old + BUFFER_NEW * new * np.abs(g) + BUFFER_SUM * np.abs(buffer)
            buffer_error = mu * incoming.states["momentum_buffer"] + new * g_error + unit * rounding
            buffer_error = buffer_error + fold * new * np.abs(g)
            error = units * buffer_error
        if self.nesterov:
            own = mu * units * np.abs(buffer)
            rounding = BUFFER_OLD * own + BUFFER_SUM * np.abs(direction)
            error = g_error + mu * units * buffer_error + unit * rounding + fold * own
        update = scalars.lr * np.abs(direction)
        relative = SGD_UPDATE * unit + FOLD * (1 + 1 / (1 - mu))
        param = incoming.param + scalars.lr * error + relative * update
        param = param + unit * WEIGHT_SUM * np.abs(after.param)
        return incoming.with_errors(param, momentum_buffer=buffer_error)
