"""Adam and AdamW: bias-corrected moments, amsgrad, L2 penalty or decoupled decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from tolerances import (
    ADAM_UPDATE,
    DECAY,
    DENOMINATOR,
    FOLD,
    INNER_SUM,
    SQUARE,
    WEIGHT_SUM,
    Bounds,
    gradient_bound,
    lerp_bound,
    root_bound,
)

from . import Array, OracleConfig, OracleState, Scalars, lerp, log_or_minus_infinity


@dataclass(frozen=True, kw_only=True)
class AdamScalars(Scalars):
    """`keep` multiplies the weights (decoupled decay); the logarithms are of the scaled betas."""

    keep: float
    log_beta1: float
    log_beta2: float
    eps: float


@dataclass(frozen=True)
class Adam(OracleConfig):
    """Carries the products of the betas used so far, for bias correction.

    They are kept as sums of logarithms, because one minus the product is what is needed and it
    would lose digits to cancellation in the first steps.
    """

    state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    decoupled: bool = False
    beta_scaling: str = "exponential"
    weight_decay_scaling: str = "exact"

    def initial_states(self, zero: Array) -> dict[str, Array]:
        names = self.state_names if self.amsgrad else self.state_names[:2]
        return dict.fromkeys(names, zero)

    def initial_carried(self) -> dict[str, float]:
        return {"log_product1": 0.0, "log_product2": 0.0}

    def scale(self, clock: float) -> AdamScalars:
        lr = math.sqrt(self.kappa) * self.lr
        log_beta1, log_beta2 = map(self.scaled_log_beta, self.betas)
        return AdamScalars(
            lr=lr,
            l2=0.0 if self.decoupled else self.weight_decay,
            keep=self.scaled_keep(lr),
            log_beta1=log_beta1,
            log_beta2=log_beta2,
            eps=self.eps / math.sqrt(self.kappa),
            ema_weights=self.ema_weights(clock),
        )

    def scaled_log_beta(self, beta: float) -> float:
        """log(beta^kappa), or log(1 - kappa (1 - beta)) for linear scaling."""
        if self.beta_scaling == "exponential":
            return self.kappa * log_or_minus_infinity(beta)
        reduction = self.kappa * (1.0 - beta)
        if not 0 < reduction <= 1:
            raise ValueError(f"linear scaling takes beta={beta} out of [0, 1) at {self.kappa}")
        return math.log1p(-reduction) if reduction < 1 else -math.inf

    def scaled_keep(self, lr: float) -> float:
        """What decoupled decay leaves of the weights: (1 - eta lambda)^kappa, eta the base rate."""
        if not self.decoupled:
            return 1.0
        if self.weight_decay_scaling == "none":
            return 1 - lr * self.weight_decay
        return math.exp(self.kappa * math.log1p(-self.lr * self.weight_decay))

    def update(self, scalars: AdamScalars, state: OracleState, g: Array) -> OracleState:
        after = self.with_moments(scalars, state, g)
        update = scalars.lr * self.normalized(scalars, after)
        return replace(after, param=scalars.keep * state.param - update)

    def with_moments(self, scalars: AdamScalars, state: OracleState, g: Array) -> OracleState:
        """The state with the moments after the gradient `g`, and with the old weights."""
        exp_avg = lerp(state.states["exp_avg"], g, -math.expm1(scalars.log_beta1))
        exp_avg_sq = lerp(state.states["exp_avg_sq"], g * g, -math.expm1(scalars.log_beta2))
        changed = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if self.amsgrad:
            largest = np.maximum(state.states["max_exp_avg_sq"], exp_avg_sq)
            changed["max_exp_avg_sq"] = largest
        product1 = state.carried["log_product1"] + scalars.log_beta1
        product2 = state.carried["log_product2"] + scalars.log_beta2
        after = replace(state, carried={"log_product1": product1, "log_product2": product2})
        return after.with_states(**changed)

    def normalized(self, scalars: AdamScalars, after: OracleState) -> Array:
        """The corrected mean over the root of the corrected square."""
        mean = after.states["exp_avg"] / -math.expm1(after.carried["log_product1"])
        kind = "max_exp_avg_sq" if self.amsgrad else "exp_avg_sq"
        square = after.states[kind] / -math.expm1(after.carried["log_product2"])
        return mean / (np.sqrt(square) + scalars.eps)

    def bounds(
        self, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g: Array
    ) -> Bounds:
        scalars = self.scale(state.clock)
        moments, root_error = self.moment_bounds(state, after, incoming, unit, g)
        update, error = update_bound(scalars, after, moments["exp_avg"], root_error, unit)
        rounding = WEIGHT_SUM * np.abs(after.param) + INNER_SUM * update
        if scalars.keep != 1:
            rounding = rounding + DECAY * np.abs(state.param)
        param = scalars.keep * incoming.param + error + unit * rounding
        return incoming.with_errors(param, **moments)

    def moment_bounds(
        self, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g: Array
    ) -> tuple[dict[str, Array], Array]:
        """Bounds of the moments' errors, and of the root's."""
        scalars, errors = self.scale(state.clock), incoming.states
        g_error = gradient_bound(scalars, state, g, incoming, unit)
        square_error = (2 * np.abs(g) + g_error) * g_error + SQUARE * unit * g * g
        beta1, beta2 = math.exp(scalars.log_beta1), math.exp(scalars.log_beta2)
        mean = beta1 * errors["exp_avg"] + (1 - beta1) * g_error
        mean = mean + lerp_bound(state.states["exp_avg"], g, 1 - beta1, unit)
        second = beta2 * errors["exp_avg_sq"] + (1 - beta2) * square_error
        second = second + lerp_bound(state.states["exp_avg_sq"], g * g, 1 - beta2, unit)
        moments = {"exp_avg": mean, "exp_avg_sq": second}
        if not self.amsgrad:
            return moments, root_bound(after.states["exp_avg_sq"], second)
        largest = np.maximum(errors["max_exp_avg_sq"], second)
        root_error = root_bound(after.states["max_exp_avg_sq"], largest)
        return {**moments, "max_exp_avg_sq": largest}, root_error


@dataclass(frozen=True)
class AdamW(Adam):
    weight_decay: float = 1e-2
    decoupled: bool = True


def update_bound(
    scalars: AdamScalars, after: OracleState, mean_error: Array, root_error: Array, unit: float
) -> tuple[Array, Array]:
    """|update| and its error, from those of the moments."""
    bc1 = -math.expm1(after.carried["log_product1"])
    bc2 = -math.expm1(after.carried["log_product2"])
    maximum = after.states.get("max_exp_avg_sq")
    square = after.states["exp_avg_sq"] if maximum is None else maximum
    denominator = np.sqrt(square / bc2) + scalars.eps
    error = root_error / math.sqrt(bc2) + DENOMINATOR * unit * denominator
    lowest = denominator - error
    if not (lowest > 0).all():
        raise ValueError("test data make Adam's denominator indistinguishable from zero")
    size = scalars.lr / bc1 * np.abs(after.states["exp_avg"]) / denominator
    relative = ADAM_UPDATE * unit + FOLD * (1 / bc1 + 1 / bc2)
    carried = scalars.lr / bc1 * mean_error / lowest + size * error / lowest
    return size, carried + size * relative
