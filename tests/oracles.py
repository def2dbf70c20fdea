"""Float64 oracles of the optimizers: one step, state in, state out, on numpy arrays.

Written from the update rules in torch.optim's documentation and from the scaling rules of "How to
Scale Your EMA" (Busbridge et al. 2023) and Malladi et al. 2022. Nothing here comes from fused_ema,
so that a mistake there cannot hide here. All steps are elementwise: several tensors with the same
hyper-parameters and history may be concatenated into one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray
Decay = float | Callable[[float], float]


@dataclass(frozen=True)
class OracleConfig:
    """Hyper-parameters at the base batch size, and how they scale with kappa."""

    rule: str  # "sgd" or "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    kappa: float = 1.0
    momentum_scaling: str = "none"
    beta_scaling: str = "exponential"
    weight_decay_scaling: str = "exact"
    ema_decay: tuple[Decay, ...] = ()
    ema_order: str = "after"


@dataclass(frozen=True)
class OracleState:
    """What one step reads and writes. `clock` counts base steps, with or without a gradient.

    The products of the betas used so far are kept as sums of logarithms, because one minus the
    product is what is needed and it would lose digits to cancellation in the first steps.
    """

    param: Array
    clock: float = 0.0
    log_product1: float = 0.0
    log_product2: float = 0.0
    momentum_buffer: Array | None = None
    exp_avg: Array | None = None
    exp_avg_sq: Array | None = None
    max_exp_avg_sq: Array | None = None
    emas: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Scalars:
    """Hyper-parameters of one step after scaling by kappa.

    `keep` multiplies the weights (decoupled decay), `log_beta1` and `log_beta2` are logarithms of
    the scaled betas, `ema_weights` are 1 - rho^kappa.
    """

    lr: float
    momentum: float
    buffer_units: float
    gradient_weight: float
    l2: float
    keep: float
    log_beta1: float
    log_beta2: float
    eps: float
    ema_weights: tuple[float, ...]


RULE_OF = {"FusedScaledSGD": "sgd", "FusedScaledAdam": "adam", "FusedScaledAdamW": "adam"}


def config_from(optimizer: str, kwargs: Mapping[str, Any]) -> OracleConfig:
    """The oracle's view of an optimizer's keyword arguments, with torch's defaults."""
    known = dict(kwargs)
    decoupled = optimizer == "FusedScaledAdamW"
    if decoupled:
        known.setdefault("weight_decay", 1e-2)
    decay = known.pop("ema_decay", None)
    decays = () if decay is None else decay if isinstance(decay, tuple) else (decay,)
    known["lr"] = float(known.get("lr", 1e-3))
    return OracleConfig(RULE_OF[optimizer], decoupled=decoupled, ema_decay=decays, **known)


def initial_state(config: OracleConfig, param: Array) -> OracleState:
    """The state before the first step: EMAs start at the weights, moments at zero."""
    param = np.array(param, dtype=np.float64)
    state = OracleState(param, emas=tuple(param.copy() for _ in config.ema_decay))
    if config.rule == "sgd":
        return state
    zero = np.zeros_like(param)
    maximum = zero if config.amsgrad else None
    return replace(state, exp_avg=zero, exp_avg_sq=zero, max_exp_avg_sq=maximum)


def log_or_minus_infinity(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def scaled_log_beta(config: OracleConfig, beta: float) -> float:
    """log(beta^kappa), or log(1 - kappa (1 - beta)) for linear scaling."""
    if config.beta_scaling == "exponential":
        return config.kappa * log_or_minus_infinity(beta)
    reduction = config.kappa * (1.0 - beta)
    if not 0 < reduction <= 1:
        raise ValueError(f"linear scaling takes beta={beta} out of [0, 1) at {config.kappa}")
    return math.log1p(-reduction) if reduction < 1 else -math.inf


def ema_weight(decay: Decay, clock: float, kappa: float) -> float:
    """1 - rho^kappa, with a scheduled rho read in the middle of the base steps from `clock`."""
    rho = decay(max(clock + (kappa - 1) / 2, 0)) if callable(decay) else decay
    return -math.expm1(kappa * log_or_minus_infinity(rho))


def scaled_sgd_rate(config: OracleConfig) -> tuple[float, float, float]:
    """Learning rate and momentum of an SGD step, and its stored buffer in units of the step's own.

    A step's own buffer tends to g / (1 - mu^kappa) where that of the base batch, which is stored,
    tends to g / (1 - mu).
    """
    lr, momentum, kappa = config.lr, config.momentum, config.kappa
    if config.momentum_scaling == "none":
        return kappa * lr, momentum, 1.0
    scaled = momentum**kappa
    units = (1 - momentum) / (1 - scaled)
    return kappa * lr / units, scaled, units


def scaled_keep(config: OracleConfig, lr: float) -> float:
    """What decoupled decay leaves of the weights: (1 - eta lambda)^kappa with the base rate."""
    if not config.decoupled:
        return 1.0
    if config.weight_decay_scaling == "none":
        return 1 - lr * config.weight_decay
    return math.exp(config.kappa * math.log1p(-config.lr * config.weight_decay))


def scale(config: OracleConfig, clock: float) -> Scalars:
    """The scaling rules: base hyper-parameters to those of one step."""
    kappa = config.kappa
    if config.rule == "sgd":
        lr, momentum, buffer_units = scaled_sgd_rate(config)
        log_beta1 = log_beta2 = 0.0
    else:
        lr, momentum, buffer_units = math.sqrt(kappa) * config.lr, 0.0, 1.0
        log_beta1, log_beta2 = (scaled_log_beta(config, beta) for beta in config.betas)
    return Scalars(
        lr=lr,
        momentum=momentum,
        buffer_units=buffer_units,
        gradient_weight=1 - config.dampening,
        l2=0.0 if config.decoupled else config.weight_decay,
        keep=scaled_keep(config, lr),
        log_beta1=log_beta1,
        log_beta2=log_beta2,
        eps=config.eps / math.sqrt(kappa),
        ema_weights=tuple(ema_weight(decay, clock, kappa) for decay in config.ema_decay),
    )


def lerp(start: Array, end: Array, weight: float) -> Array:
    return (1 - weight) * start + weight * end


def effective_gradient(
    config: OracleConfig, scalars: Scalars, state: OracleState, grad: Array
) -> Array:
    signed = -grad if config.maximize else grad
    return signed + scalars.l2 * state.param


def sgd_direction(
    config: OracleConfig, scalars: Scalars, state: OracleState, g: Array
) -> tuple[Array, Array | None]:
    """The direction of an SGD step and the buffer to store (its first gradient is undamped)."""
    if config.momentum == 0:
        return g, None
    buffer = g
    if state.momentum_buffer is not None:
        old = scalars.buffer_units * state.momentum_buffer
        buffer = scalars.momentum * old + scalars.gradient_weight * g
    direction = g + scalars.momentum * buffer if config.nesterov else buffer
    return direction, buffer / scalars.buffer_units


def sgd_step(config: OracleConfig, scalars: Scalars, state: OracleState, g: Array) -> OracleState:
    direction, buffer = sgd_direction(config, scalars, state, g)
    return replace(state, param=state.param - scalars.lr * direction, momentum_buffer=buffer)


def adam_step(config: OracleConfig, scalars: Scalars, state: OracleState, g: Array) -> OracleState:
    exp_avg = lerp(state.exp_avg, g, -math.expm1(scalars.log_beta1))
    exp_avg_sq = lerp(state.exp_avg_sq, g * g, -math.expm1(scalars.log_beta2))
    maximum = np.maximum(state.max_exp_avg_sq, exp_avg_sq) if config.amsgrad else None
    product1 = state.log_product1 + scalars.log_beta1
    product2 = state.log_product2 + scalars.log_beta2
    mean = exp_avg / -math.expm1(product1)
    square = (maximum if config.amsgrad else exp_avg_sq) / -math.expm1(product2)
    update = scalars.lr * mean / (np.sqrt(square) + scalars.eps)
    return replace(
        state,
        param=scalars.keep * state.param - update,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        max_exp_avg_sq=maximum,
        log_product1=product1,
        log_product2=product2,
    )


def ema_step(
    config: OracleConfig, scalars: Scalars, before: OracleState, seen: Array
) -> tuple[Array, ...]:
    """Moves every EMA towards the weights: those before the step, or `seen` after it."""
    target = before.param if config.ema_order == "before" else seen
    pairs = zip(before.emas, scalars.ema_weights, strict=True)
    return tuple(lerp(ema, target, weight) for ema, weight in pairs)


STEP_OF = {"sgd": sgd_step, "adam": adam_step}


def oracle_step(
    config: OracleConfig,
    state: OracleState,
    grad: Array | None,
    *,
    seen: Array | None = None,
    scale: Callable[[OracleConfig, float], Scalars] = scale,
) -> OracleState:
    """One optimizer step; without a gradient only the EMAs move.

    `seen` replaces the new weights in the EMA's update: the ones actually stored, where a storage
    format rounded them. `scale` is replaced by tests that show which mistakes the bounds catch.
    """
    scalars = scale(config, state.clock)
    after = state
    if grad is not None:
        g = effective_gradient(config, scalars, state, grad)
        after = STEP_OF[config.rule](config, scalars, state, g)
    emas = ema_step(config, scalars, state, after.param if seen is None else seen)
    return replace(after, emas=emas, clock=state.clock + config.kappa)


def trajectory(
    steps: Iterable[tuple[OracleConfig, Array | None]], param: Array
) -> list[OracleState]:
    """States from the first to the last, for pairs of (hyper-parameters of the step, gradient)."""
    states: list[OracleState] = []
    for config, grad in steps:
        state = states[-1] if states else initial_state(config, param)
        states.append(oracle_step(config, state, grad))
    return states
