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
    RMSProp's variance  v - m m     2 (v + m m) (product, difference)
    RMSProp's denominator           3 D (root, eps, sum)
    RMSProp's direction  g / D      1 |direction| (division); its update is SGD's
    weights  p - update             1 |p'| + 1 |update| for Adam (inner sum)
    decoupled decay                 3 |p| (scalar, product, difference)
    LAMB's u = m / D + l p          that of m / D, and 2 |l p| (scalar, product) + 1 |u| (sum)
    trust ratio                     1 ratio; its norms are those of rounded vectors
    LAMB's update  lr ratio u       3 |update| (scalar, two products)
    LARS's gradient  ratio g        1 |ratio g|, and 1 |g| in the norm (factor)

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

Norms of trust ratios are summed in float64 whatever the compute format, which leaves a relative
error of TRUST in the ratio of two. The norm of an error vector bounds the error of a norm.

A format narrower than the compute format adds half a unit in its last place, once, on store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
# A trust ratio's, of two norms in float64: in squares, sums, roots and the division.
TRUST = 3 * NORM * UNIT[torch.float64]
GRADIENT_DECAY, GRADIENT_SUM = 2, 1
LERP_NEW, LERP_OLD = 5, 3
SQUARE = 1
BUFFER_OLD, BUFFER_NEW, BUFFER_SUM = 3, 2, 1
DENOMINATOR = 4
ADAM_UPDATE, SGD_UPDATE = 4, 2
VARIANCE, RMSPROP_DENOMINATOR, RMSPROP_DIRECTION = 2, 3, 1
WEIGHT_SUM, INNER_SUM, DECAY = 1, 1, 3
LAMB_DECAY, LAMB_SUM, LAMB_UPDATE = 2, 1, 3
RATIO, LARS_NORM, LARS_PRODUCT = 1, 1, 1
FOLD = 4 * UNIT[torch.float64]
# Error of a scalar that a device has folded: several functions, each off by a few units in the last
# place. Compiled as C++ for the host, they are the host's functions. `ABSOLUTE` is the error of a
# power that is subtracted from one.
FOLDED = {"shim": 0, "triton": 16}
ABSOLUTE = 4
HIGHER_ORDER = 1 + 2.0**-10


@dataclass(frozen=True)
class Bounds:
    """Absolute error bounds of the arrays of an OracleState, elementwise."""

    param: Array
    states: Mapping[str, Array]
    emas: tuple[Array, ...]

    def with_errors(self, param: Array, **states: Array) -> Bounds:
        return replace(self, param=param, states={**self.states, **states})

    def times(self, factor: float) -> Bounds:
        states = {name: factor * bound for name, bound in self.states.items()}
        return Bounds(factor * self.param, states, tuple(factor * bound for bound in self.emas))


def no_error(state: OracleState) -> Bounds:
    zero = np.zeros_like(state.param)
    return Bounds(zero, dict.fromkeys(state.states, zero), tuple(zero for _ in state.emas))


def half_ulp(x: Array, dtype: torch.dtype) -> Array:
    """Half the distance between neighbours of the format at the magnitude of x."""
    bits, smallest = FORMAT[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1
    exponent = np.where(x == 0, smallest, np.maximum(exponent, smallest))
    return np.ldexp(1.0, exponent - bits)


def folding_bound(value: float, backend: str, powers: float = 0.0) -> float:
    """Bound of a folded scalar's error; ``powers`` is the factor of the powers in it.

    A schedule's decay counts as such a power too: it is near one, and raised to kappa.
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


def root_bound(square: Array, error: Array) -> Array:
    """The largest change of sqrt(square) when square may be off by error."""
    root = np.sqrt(square)
    span = root + np.sqrt(np.maximum(square - error, 0))
    return np.divide(error, span, out=np.zeros_like(error), where=span > 0)


def ratio_bound(weight: Array, weight_error: Array, step: Array, step_error: Array) -> float:
    """Relative error of |weight| / |step|, both of which are not 0; without its rounding."""
    total = TRUST
    for values, error in ((weight, weight_error), (step, step_error)):
        size, change = np.linalg.norm(values), np.linalg.norm(error)
        if not change < size:
            raise ValueError("test data make a norm indistinguishable from zero")
        total += change / (size - change)
    return total


def ema_bounds(
    config: OracleConfig, state: OracleState, target: Array, target_error: Array | float,
    incoming: Bounds, unit: float,
) -> tuple[Array, ...]:  # fmt: skip
    weights = config.ema_weights(state.clock)
    triples = zip(state.emas, incoming.emas, weights, strict=True)
    return tuple(
        (1 - weight) * error + weight * target_error + lerp_bound(ema, target, weight, unit)
        for ema, error, weight in triples
    )


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
        g = effective_gradient(config, config.scale(state.clock), state, grad)
        outgoing = config.bounds(state, after, incoming, unit, g)
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
) -> Iterator[tuple[str, Array | None, Array | None, Array | None]]:
    """Name, both values and the bound of everything that is compared."""
    bound = storage_bound(expected.param, bounds.param, storage)
    yield "param", actual.param, expected.param, bound
    for name in {**expected.states, **actual.states}:
        wanted, bound = expected.states.get(name), bounds.states.get(name)
        bound = bound if wanted is None else storage_bound(wanted, bound, storage)
        yield name, actual.states.get(name), wanted, bound
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
    scaled = bounds.times(implementations)
    return compare(actual, expected, scaled, dtype, f"{context} (trajectory)")
