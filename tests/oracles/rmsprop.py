"""RMSProp: momentum, the centered form, L2 penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from tolerances import (
    BUFFER_NEW,
    BUFFER_OLD,
    BUFFER_SUM,
    FOLD,
    RMSPROP_DENOMINATOR,
    RMSPROP_DIRECTION,
    SGD_UPDATE,
    SQUARE,
    VARIANCE,
    WEIGHT_SUM,
    Bounds,
    gradient_bound,
    lerp_bound,
    root_bound,
)

from . import Array, OracleConfig, OracleState, Scalars, lerp, log_or_minus_infinity


@dataclass(frozen=True, kw_only=True)
class RmspropScalars(Scalars):
    """`entry` is what a direction adds to the stored buffer, which is that of the base batch."""

    log_alpha: float
    eps: float
    momentum: float
    entry: float


@dataclass(frozen=True)
class Rmsprop(OracleConfig):
    state_names = ("square_avg", "momentum_buffer", "grad_avg")

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    momentum_scaling: str = "none"

    def initial_states(self, zero: Array) -> dict[str, Array]:
        states = {"square_avg": zero}
        if self.momentum:
            states["momentum_buffer"] = zero
        if self.centered:
            states["grad_avg"] = zero
        return states

    def scale(self, clock: float) -> RmspropScalars:
        root = math.sqrt(self.kappa)
        momentum, entry = self.momentum, 1.0
        if self.momentum_scaling == "exact":
            momentum = self.momentum**self.kappa
            entry = (1 - momentum) / (1 - self.momentum)
        return RmspropScalars(
            lr=root * self.lr,
            l2=self.weight_decay,
            log_alpha=self.kappa * log_or_minus_infinity(self.alpha),
            eps=self.eps / root,
            momentum=momentum,
            entry=entry,
            ema_weights=self.ema_weights(clock),
        )

    def denominator(self, scalars: RmspropScalars, states: dict[str, Array | None]) -> Array:
        square, mean = states["square_avg"], states["grad_avg"]
        second = square if mean is None else np.maximum(square - mean * mean, 0)
        return np.sqrt(second) + scalars.eps

    def update(self, scalars: RmspropScalars, state: OracleState, g: Array) -> OracleState:
        weight = -math.expm1(scalars.log_alpha)
        states = dict(state.states)
        states["square_avg"] = lerp(states["square_avg"], g * g, weight)
        if self.centered:
            states["grad_avg"] = lerp(states["grad_avg"], g, weight)
        direction = g / self.denominator(scalars, states)
        if self.momentum:
            old = scalars.momentum * states["momentum_buffer"]
            direction = states["momentum_buffer"] = old + scalars.entry * direction
        return replace(state, param=state.param - scalars.lr * direction, states=states)

    def second_error(
        self, after: OracleState, square_error: Array, mean_error: Array, unit: float
    ) -> tuple[Array, Array]:
        """What the root is taken of, and its error."""
        square, mean = after.states["square_avg"], after.states["grad_avg"]
        if mean is None:
            return square, square_error
        product = (2 * np.abs(mean) + mean_error) * mean_error
        rounding = VARIANCE * unit * (square + mean * mean)
        return np.maximum(square - mean * mean, 0), square_error + product + rounding

    def bounds(
        self, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g: Array
    ) -> Bounds:
        scalars, errors = self.scale(state.clock), dict(incoming.states)
        g_error = gradient_bound(scalars, state, g, incoming, unit)
        alpha = math.exp(scalars.log_alpha)
        weight = 1 - alpha
        product_error = (2 * np.abs(g) + g_error) * g_error + SQUARE * unit * g * g
        errors["square_avg"] = alpha * errors["square_avg"] + weight * product_error
        errors["square_avg"] += lerp_bound(state.states["square_avg"], g * g, weight, unit)
        if self.centered:
            errors["grad_avg"] = alpha * errors["grad_avg"] + weight * g_error
            errors["grad_avg"] += lerp_bound(state.states["grad_avg"], g, weight, unit)
        second, error = self.second_error(after, errors["square_avg"], errors["grad_avg"], unit)
        denominator = np.sqrt(second) + scalars.eps
        error = root_bound(second, error) + RMSPROP_DENOMINATOR * unit * denominator
        lowest = denominator - error
        if not (lowest > 0).all():
            raise ValueError("test data make RMSProp's denominator indistinguishable from zero")
        direction = np.abs(g) / denominator
        error = (g_error + direction * error) / lowest + RMSPROP_DIRECTION * unit * direction
        if self.momentum:
            mu, old = scalars.momentum, np.abs(state.states["momentum_buffer"])
            fold = FOLD * (1 / (1 - mu) + 1 / (1 - self.momentum))
            new = scalars.entry * direction
            direction = np.abs(after.states["momentum_buffer"])
            rounding = BUFFER_OLD * mu * old + BUFFER_NEW * new + BUFFER_SUM * direction
            error = scalars.entry * error + unit * rounding + fold * new
            error = errors["momentum_buffer"] = mu * errors["momentum_buffer"] + error
        update = scalars.lr * direction
        param = incoming.param + scalars.lr * error + SGD_UPDATE * unit * update
        param = param + unit * WEIGHT_SUM * np.abs(after.param)
        return incoming.with_errors(param, **errors)
