"""Float64 oracles of the optimizers: one step, state in, state out, on numpy arrays.

Written from the update rules in torch.optim's documentation and from the scaling rules of "How to
Scale Your EMA" (Busbridge et al. 2023) and Malladi et al. 2022. Nothing here comes from fused_ema,
so that a mistake there cannot hide here. A rule has a file with its hyper-parameters, its step and
the bounds of a rounded one. Several tensors with the same hyper-parameters and history may be
concatenated into one vector, unless the rule looks at whole tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from tolerances import Bounds

Array = np.ndarray
Decay = float | Callable[[float], float]


@dataclass(frozen=True)
class OracleState:
    """What one step reads and writes. `clock` counts base steps, with or without a gradient.

    states: arrays by torch's names, None where there is none.
    carried: numbers that a rule takes from step to step; an optimizer has them from its counts.
    """

    param: Array
    clock: float = 0.0
    states: Mapping[str, Array | None] = field(default_factory=dict)
    carried: Mapping[str, float] = field(default_factory=dict)
    emas: tuple[Array, ...] = ()

    def with_states(self, **changes: Array | None) -> OracleState:
        return replace(self, states={**self.states, **changes})


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """Hyper-parameters of one step after scaling by kappa; `ema_weights` are 1 - rho^kappa."""

    lr: float
    l2: float
    ema_weights: tuple[float, ...]


@dataclass(frozen=True)
class OracleConfig(ABC):
    """A rule, and its hyper-parameters at the base batch size.

    state_names: torch's names of all states that any setting needs.
    late_states: those that begin with the first gradient; an optimizer may hold zeros before.
    elementwise: whether an element's step is its own affair; else a vector is one whole tensor.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    late_states: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True

    lr: float = 1e-3
    weight_decay: float = 0.0
    maximize: bool = False
    kappa: float = 1.0
    ema_decay: tuple[Decay, ...] = ()
    ema_order: str = "after"

    @abstractmethod
    def initial_states(self, zero: Array) -> dict[str, Array]:
        """The states that exist before the first gradient."""

    def initial_carried(self) -> dict[str, float]:
        return {}

    @abstractmethod
    def scale(self, clock: float) -> Scalars:
        """The scaling rules: base hyper-parameters to those of one step."""

    @abstractmethod
    def update(self, scalars: Scalars, state: OracleState, g: Array) -> OracleState:
        """One step along the gradient `g`, which has its sign and its L2 penalty."""

    @abstractmethod
    def bounds(
        self, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g: Array
    ) -> Bounds:
        """Bounds of the weights' and the states' errors after that step, see tolerances.py."""

    def ema_weights(self, clock: float) -> tuple[float, ...]:
        return tuple(ema_rate(decay, clock, self.kappa) for decay in self.ema_decay)


def log_or_minus_infinity(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def ema_rate(decay: Decay, clock: float, kappa: float) -> float:
    """1 - rho^kappa, with a scheduled rho read in the middle of the base steps from `clock`."""
    rho = decay(max(clock + (kappa - 1) / 2, 0)) if callable(decay) else decay
    return -math.expm1(kappa * log_or_minus_infinity(rho))


def initial_state(config: OracleConfig, param: Array) -> OracleState:
    """The state before the first step: EMAs start at the weights."""
    param = np.array(param, dtype=np.float64)
    none: dict[str, Array | None] = dict.fromkeys(config.state_names)
    states = {**none, **config.initial_states(np.zeros_like(param))}
    emas = tuple(param.copy() for _ in config.ema_decay)
    return OracleState(param, 0.0, states, config.initial_carried(), emas)


def lerp(start: Array, end: Array, weight: float) -> Array:
    return (1 - weight) * start + weight * end


def effective_gradient(
    config: OracleConfig, scalars: Scalars, state: OracleState, grad: Array
) -> Array:
    signed = -grad if config.maximize else grad
    return signed + scalars.l2 * state.param


def ema_step(
    config: OracleConfig, scalars: Scalars, before: OracleState, seen: Array
) -> tuple[Array, ...]:
    """Moves every EMA towards the weights: those before the step, or `seen` after it."""
    target = before.param if config.ema_order == "before" else seen
    pairs = zip(before.emas, scalars.ema_weights, strict=True)
    return tuple(lerp(ema, target, weight) for ema, weight in pairs)


def oracle_step(
    config: OracleConfig,
    state: OracleState,
    grad: Array | None,
    *,
    seen: Array | None = None,
    scalars: Scalars | None = None,
) -> OracleState:
    """One optimizer step; without a gradient only the EMAs move.

    `seen` replaces the new weights in the EMA's update: the ones actually stored, where a storage
    format rounded them. `scalars` are given by tests that show which mistakes the bounds catch.
    """
    if scalars is None:
        scalars = config.scale(state.clock)
    after = state
    if grad is not None:
        g = effective_gradient(config, scalars, state, grad)
        after = config.update(scalars, state, g)
    emas = ema_step(config, scalars, state, after.param if seen is None else seen)
    return replace(after, emas=emas, clock=state.clock + config.kappa)
