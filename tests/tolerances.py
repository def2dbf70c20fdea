"""The one table of tolerances, derived by counting roundings.

u is the unit roundoff of the *compute* format: 2^-24 for float32 (float32, bfloat16 and float16
tensors), 2^-53 for float64. Scalars are folded in float64 and rounded once to the compute format.
Every line is to first order in u and holds for all orders of evaluation in use: ours, torch's
for-loop and foreach optimizers, with or without fused multiply-add.

    quantity                        roundings, times u
    gradient  g = +-grad + l2 p     2 |l2 p| (scalar, product) + |g| (sum); 0 without l2
    lerp      a + w (b - a)         5 w (|a| + |b|) + 3 (1-w) |a|
                                    a + w(b-a): 3 w |b-a| + 1 |result|;
                                    b - (1-w)(b-a), w >= 1/2: (1 + 2(1-w)) |b-a| + 1 |result|;
                                    (1-w) a + w b: 2 (1-w) |a| + 3 w |b| + 1 |result|
    square    g g                   1 g^2
    buffer    mu b + c (1-damp) g   3 mu |b| + 2 c (1-damp) |g| + 1 |result|
    nesterov  g + (mu/c) b          3 (mu/c) |b| + 1 |result|
    Adam's denominator              4 D (root, division by root of bc2 or folding, eps, sum)
    Adam's update  s m / D          4 |update| (step size twice, product, division)
    SGD's update   lr d             2 |update| (scalar, product)
    weights  p - update             1 |p'| + 1 |update| for Adam (inner sum)
    decoupled decay                 3 |p| (scalar, product, difference)

The buffer b is the stored one: c is 1, or (1 - mu^kappa)/(1 - mu) where momentum scales, and it
is c times what a run at this kappa alone would hold.

Folding in float64 leaves an *absolute* error of a few 2^-53 in 1-beta, in the bias corrections
and in 1-mu (they may be computed as one minus a power). It matters for float64 only and is added
with FOLD = 4 * 2^-53. The oracle rounds too: u + 2^-53 stands for u everywhere.

Incoming errors are carried through the same step, so a bound for T steps is this map applied T
times (running error analysis). With the recursions linear (momentum, EMA, decay: all factors at
most 1) errors add up at most linearly in T. Adam's division amplifies an error of the square
average by |update| / (2 sqrt(v) D) and of the mean by step / D: both are evaluated on the
trajectory, with the smallest denominator that the error of D allows.

A format narrower than the compute format adds half a unit in its last place, once, on store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from oracles import (
    Array,
    OracleConfig,
    OracleState,
    Scalars,
    effective_gradient,
    oracle_step,
    scale,
    sgd_direction,
)

COMPUTE_OF = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# significand bits (with the hidden one) and smallest normal exponent
FORMAT = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
}

# A norm's relative error: a square, at most 256 sums in the compute format, halved by the root.
NORM = 129
GRADIENT_DECAY, GRADIENT_SUM = 2, 1
LERP_NEW, LERP_OLD = 5, 3
SQUARE = 1
BUFFER_OLD, BUFFER_NEW, BUFFER_SUM = 3, 2, 1
DENOMINATOR = 4
ADAM_UPDATE, SGD_UPDATE = 4, 2
WEIGHT_SUM, INNER_SUM, DECAY = 1, 1, 3
FOLD = 4 * UNIT[torch.float64]
# Of a scalar that a device has folded: several functions, each off by a few units in the last
# place. As C++ on the host they are the host's. `ABSOLUTE`: of a power that is taken from one.
FOLDED = {"shim": 0, "triton": 16}
ABSOLUTE = 4
HIGHER_ORDER = 1 + 2.0**-10

FIELDS = ("param", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True)
class Bounds:
    """Absolute error bounds of the fields of an OracleState, elementwise."""

    param: Array
    momentum_buffer: Array
    exp_avg: Array
    exp_avg_sq: Array
    max_exp_avg_sq: Array
    emas: tuple[Array, ...]


def no_error(state: OracleState) -> Bounds:
    zero = np.zeros_like(state.param)
    return Bounds(zero, zero, zero, zero, zero, tuple(zero for _ in state.emas))


def half_ulp(x: Array, dtype: torch.dtype) -> Array:
    """Half the distance between neighbours of the format at the magnitude of x."""
    bits, smallest = FORMAT[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1
    exponent = np.where(x == 0, smallest, np.maximum(exponent, smallest))
    return np.ldexp(1.0, exponent - bits)


def folding_bound(value: float, backend: str, powers: float = 0.0) -> float:
    """Of a folded scalar against the host's; ``powers``: what those in it are multiplied by.

    A schedule's decay is such a power, too: it is near one, and raised to kappa.
    """
    if FOLDED[backend] == 0:
        return 0.0
    return UNIT[torch.float64] * (FOLDED[backend] * abs(value) + ABSOLUTE * powers)


def lerp_bound(start: Array, end: Array, weight: float, unit: float) -> Array:
    old, new = np.abs(start), np.abs(end)
    rounding = LERP_NEW * weight * (old + new) + LERP_OLD * (1 - weight) * old
    return unit * rounding + FOLD * (old + new)


def gradient_bound(
    scalars: Scalars, state: OracleState, g: Array, incoming: Bounds, unit: float
) -> Array:
    if scalars.l2 == 0:
        return np.zeros_like(g)
    product = GRADIENT_DECAY * np.abs(scalars.l2 * state.param)
    return scalars.l2 * incoming.param + unit * (product + GRADIENT_SUM * np.abs(g))


def sgd_bounds(
    config: OracleConfig, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g
) -> Bounds:
    scalars = scale(config, state.clock)
    mu, units = scalars.momentum, scalars.buffer_units
    entry = 1 / units
    fold = 0.0 if units == 1 else FOLD * (1 / (1 - mu) + 1 / (1 - config.momentum))
    g_error = gradient_bound(scalars, state, g, incoming, unit)
    direction, buffer = sgd_direction(config, scalars, state, g)
    error = buffer_error = g_error
    if buffer is not None and (state.momentum_buffer is not None or units != 1):
        first = state.momentum_buffer is None
        old = 0.0 if first else mu * np.abs(state.momentum_buffer)
        new = entry if first else entry * abs(scalars.gradient_weight)
        rounding = BUFFER_OLD * old + BUFFER_NEW * new * np.abs(g) + BUFFER_SUM * np.abs(buffer)
        buffer_error = mu * incoming.momentum_buffer + new * g_error + unit * rounding
        buffer_error = buffer_error + fold * new * np.abs(g)
        error = units * buffer_error
    if config.nesterov:
        own = mu * units * np.abs(buffer)
        rounding = BUFFER_OLD * own + BUFFER_SUM * np.abs(direction)
        error = g_error + mu * units * buffer_error + unit * rounding + fold * own
    update = scalars.lr * np.abs(direction)
    relative = SGD_UPDATE * unit + FOLD * (1 + 1 / (1 - mu))
    param = incoming.param + scalars.lr * error + relative * update
    param = param + unit * WEIGHT_SUM * np.abs(after.param)
    return replace(incoming, param=param, momentum_buffer=buffer_error)


def root_bound(square: Array, error: Array) -> Array:
    """The largest change of sqrt(square) when square may be off by error."""
    root = np.sqrt(square)
    span = root + np.sqrt(np.maximum(square - error, 0))
    return np.divide(error, span, out=np.zeros_like(error), where=span > 0)


def update_bound(
    scalars: Scalars, after: OracleState, mean_error: Array, root_error: Array, unit: float
) -> tuple[Array, Array]:
    """Adam's |update| and its error, from those of the moments."""
    bc1, bc2 = -math.expm1(after.log_product1), -math.expm1(after.log_product2)
    square = after.exp_avg_sq if after.max_exp_avg_sq is None else after.max_exp_avg_sq
    denominator = np.sqrt(square / bc2) + scalars.eps
    error = root_error / math.sqrt(bc2) + DENOMINATOR * unit * denominator
    lowest = denominator - error
    if not (lowest > 0).all():
        raise ValueError("test data make Adam's denominator indistinguishable from zero")
    size = scalars.lr / bc1 * np.abs(after.exp_avg) / denominator
    relative = ADAM_UPDATE * unit + FOLD * (1 / bc1 + 1 / bc2)
    carried = scalars.lr / bc1 * mean_error / lowest + size * error / lowest
    return size, carried + size * relative


def adam_bounds(
    config: OracleConfig, state: OracleState, after: OracleState, incoming: Bounds, unit: float, g
) -> Bounds:
    scalars = scale(config, state.clock)
    g_error = gradient_bound(scalars, state, g, incoming, unit)
    square_error = (2 * np.abs(g) + g_error) * g_error + SQUARE * unit * g * g
    beta1, beta2 = math.exp(scalars.log_beta1), math.exp(scalars.log_beta2)
    mean = beta1 * incoming.exp_avg + (1 - beta1) * g_error
    mean = mean + lerp_bound(state.exp_avg, g, 1 - beta1, unit)
    second = beta2 * incoming.exp_avg_sq + (1 - beta2) * square_error
    second = second + lerp_bound(state.exp_avg_sq, g * g, 1 - beta2, unit)
    largest, used = incoming.max_exp_avg_sq, after.exp_avg_sq
    if config.amsgrad:
        largest, used = np.maximum(largest, second), after.max_exp_avg_sq
    root_error = root_bound(used, largest if config.amsgrad else second)
    update, error = update_bound(scalars, after, mean, root_error, unit)
    rounding = WEIGHT_SUM * np.abs(after.param) + INNER_SUM * update
    if scalars.keep != 1:
        rounding = rounding + DECAY * np.abs(state.param)
    param = scalars.keep * incoming.param + error + unit * rounding
    return replace(incoming, param=param, exp_avg=mean, exp_avg_sq=second, max_exp_avg_sq=largest)


def ema_bounds(
    config: OracleConfig, state: OracleState, target: Array, target_error: Array | float,
    incoming: Bounds, unit: float,
) -> tuple[Array, ...]:  # fmt: skip
    weights = scale(config, state.clock).ema_weights
    triples = zip(state.emas, incoming.emas, weights, strict=True)
    return tuple(
        (1 - weight) * error + weight * target_error + lerp_bound(ema, target, weight, unit)
        for ema, error, weight in triples
    )


BOUNDS_OF = {"sgd": sgd_bounds, "adam": adam_bounds}


def propagate(
    config: OracleConfig,
    state: OracleState,
    grad: Array | None,
    incoming: Bounds,
    after: OracleState,
    compute: torch.dtype,
    seen: Array | None = None,
) -> Bounds:
    """Error bounds after the step from `state` to `after`, for errors `incoming` before it.

    With `seen` the EMA is compared against one that follows these very weights, so that the error
    of the weights does not enter it.
    """
    unit = HIGHER_ORDER * (UNIT[compute] + UNIT[torch.float64])
    outgoing = incoming
    if grad is not None:
        g = effective_gradient(config, scale(config, state.clock), state, grad)
        outgoing = BOUNDS_OF[config.rule](config, state, after, incoming, unit, g)
    target, error = (after.param, outgoing.param) if seen is None else (seen, 0.0)
    if config.ema_order == "before":
        target, error = state.param, incoming.param
    return replace(outgoing, emas=ema_bounds(config, state, target, error, incoming, unit))


def worst_of(actual: Array, expected: Array, bound: Array) -> tuple[float, int, int]:
    """The largest error in units of its bound, where it is, and how many are outside."""
    if not actual.size:
        return 0.0, -1, 0
    error = np.abs(actual - expected)
    error[~np.isfinite(actual)] = np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / bound)
    worst = int(np.argmax(ratio))
    return float(ratio[worst]), worst, int((ratio > 1).sum())


def report(actual: Array, expected: Array, bound: Array, what: str) -> tuple[float, str]:
    """The largest error in units of its bound, and a message if that is more than one."""
    if actual.shape != expected.shape:
        return np.inf, f"{what}: shape {actual.shape}, expected {expected.shape}"
    ratio, worst, outside = worst_of(actual, expected, bound)
    if ratio <= 1:
        return ratio, ""
    found, wanted = float(actual[worst]), float(expected[worst])
    return ratio, (
        f"{what}: element {worst} is {found!r}, expected {wanted!r}: error "
        f"{abs(found - wanted):.3e} is {ratio:.2f} times the bound {bound[worst]:.3e}; "
        f"{outside} of {actual.size} elements outside"
    )


def storage_bound(expected: Array, bound: Array, storage: torch.dtype) -> Array:
    if COMPUTE_OF[storage] == storage:
        return bound
    return bound + half_ulp(np.abs(expected) + bound, storage)


def pairs_of(
    actual: OracleState, expected: OracleState, bounds: Bounds, storage: torch.dtype
) -> Iterator[tuple[str, Array | None, Array | None, Array]]:
    """Name, both values and the bound of everything that is compared."""
    for name in FIELDS:
        wanted, bound = getattr(expected, name), getattr(bounds, name)
        bound = bound if wanted is None else storage_bound(wanted, bound, storage)
        yield name, getattr(actual, name), wanted, bound
    for index, emas in enumerate(zip_longest(actual.emas, expected.emas, bounds.emas)):
        yield f"EMA {index}", *emas


def compare(
    actual: OracleState, expected: OracleState, bounds: Bounds, storage: torch.dtype, context: str
) -> dict[str, float]:
    """Fails naming the worst element of every field outside its bound; returns all ratios."""
    ratios: dict[str, float] = {}
    failures = []
    for name, found, wanted, bound in pairs_of(actual, expected, bounds, storage):
        if found is None or wanted is None:
            failures += [] if found is wanted else [f"{name}: {found} instead of {wanted}"]
            continue
        ratios[name], failure = report(found, wanted, bound, name)
        failures += [failure] if failure else []
    if failures:
        raise AssertionError("\n".join([context, *failures]))
    return ratios


def assert_local(
    config: OracleConfig,
    before: OracleState,
    grad: Array | None,
    actual: OracleState,
    storage: torch.dtype,
    context: str = "",
) -> dict[str, float]:
    """`actual` is one step from `before`: both hold the very values that the optimizer stores."""
    expected = oracle_step(config, before, grad, seen=actual.param)
    compute, exact = COMPUTE_OF[storage], no_error(before)
    bounds = propagate(config, before, grad, exact, expected, compute, actual.param)
    return compare(actual, expected, bounds, storage, f"{context} (local)")


def assert_trajectory(
    actual: OracleState,
    expected: OracleState,
    bounds: Bounds,
    dtype: torch.dtype,
    context: str = "",
    implementations: int = 1,
) -> dict[str, float]:
    """`actual` ends a trajectory whose errors are `bounds`.

    Comparing two rounded implementations with each other, both may be off: `implementations=2`.
    """
    scaled = Bounds(
        *(implementations * getattr(bounds, field) for field in FIELDS),
        tuple(implementations * bound for bound in bounds.emas),
    )
    return compare(actual, expected, scaled, dtype, f"{context} (trajectory)")
