"""Runs an optimizer on a declared case, with what the oracle needs to follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from cases import Case, Shape
from optimizers import STATE_NAMES
from oracles import Array, OracleConfig, OracleState, initial_state, oracle_step
from tolerances import COMPUTE_OF, Bounds, assert_local, assert_trajectory, no_error, propagate

SKIP_PATTERNS = 3
Ratios = dict[str, float]
Taken = Callable[[list[Array | None], list[torch.dtype]], list[Array | None]]
DEVICE = torch.device("cpu")  # where the problems are, see --device


@dataclass(frozen=True)
class Cohort:
    """Parameters of one group, dtype and history of gradients: one vector for the oracle.

    A single one, if the rule is not elementwise.
    """

    params: tuple[torch.nn.Parameter, ...]
    group: int
    skipped: frozenset[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype


@dataclass
class Problem:
    """Parameters in groups, and gradients of every step drawn from one generator."""

    cohorts: list[Cohort]
    groups: list[dict[str, Any]]
    generator: torch.Generator

    def set_gradients(self, step: int) -> list[Array | None]:
        """Sets every .grad; returns what each cohort's oracle sees."""
        return [self.set_gradient(cohort, step) for cohort in self.cohorts]

    def set_gradient(self, cohort: Cohort, step: int) -> Array | None:
        sizes = [p.numel() for p in cohort.params]
        parts = np.split(draw_gradient(sum(sizes), self.generator), np.cumsum(sizes)[:-1])
        for p, part in zip(cohort.params, parts, strict=True):
            grad = torch.empty_like(p, requires_grad=False)
            p.grad = grad.copy_(torch.from_numpy(part.reshape(p.shape)))
        if step not in cohort.skipped:
            return vector(p.grad for p in cohort.params)
        for p in cohort.params:
            p.grad = None
        return None


def vector(tensors: Iterable[torch.Tensor]) -> Array:
    """All elements in logical order, exactly, as one float64 array."""
    return np.concatenate([as_float64(t.detach()).ravel() for t in tensors])


def as_float64(tensor: torch.Tensor) -> Array:
    # numpy does not know bfloat16
    known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return known.cpu().numpy().astype(np.float64)


def draw_parameter(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> torch.nn.Parameter:
    data = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if len(shape) == 4:
        data = data.contiguous(memory_format=torch.channels_last)
    return torch.nn.Parameter(data.to(DEVICE))


def draw_gradient(size: int, generator: torch.Generator) -> Array:
    """Between 1/4 and a few, mostly of one sign per element."""
    normal = torch.randn(size, generator=generator, dtype=torch.float64).numpy()
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).numpy()
    negative = (uniform < 0.25) ^ (np.arange(size) % 3 == 0)
    return np.where(negative, -1.0, 1.0) * (np.abs(normal) + 0.25)


def skipped_steps(
    case: Case, pattern: int, steps: int, generator: torch.Generator
) -> frozenset[int]:
    if not case.none_rate:
        return frozenset()
    drawn = torch.rand(steps, generator=generator) < case.none_rate
    late_start = range(pattern)
    return frozenset(np.flatnonzero(drawn.numpy()).tolist()) | frozenset(late_start)


def make_problem(
    case: Case,
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
    steps: int,
    seed: int = 0,
) -> Problem:
    """Deals the shapes out to the case's groups, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    patterns = SKIP_PATTERNS if case.none_rate else 1
    skips = [skipped_steps(case, pattern, steps, generator) for pattern in range(patterns)]
    together = all(config.elementwise for config in configs_of(case))
    dealt: dict[tuple[int, int, torch.dtype, int], list[torch.nn.Parameter]] = {}
    for dtype in dtypes:
        for index, shape in enumerate(shapes):
            group, pattern = index % len(case.groups), index // len(case.groups) % patterns
            key = (group, pattern, dtype, 0 if together else index)
            dealt.setdefault(key, []).append(draw_parameter(shape, dtype, generator))
    cohorts = [Cohort(tuple(ps), group, skips[k]) for (group, k, *_), ps in dealt.items()]
    groups = [
        {"params": [p for c in cohorts if c.group == index for p in c.params], **overrides}
        for index, overrides in enumerate(case.groups)
    ]
    return Problem(cohorts, groups, generator)


def arguments(case: Case) -> dict[str, Any]:
    kwargs = dict(case.kwargs)
    if case.tensor_lr:
        kwargs["lr"] = torch.tensor(kwargs["lr"], dtype=torch.float64)
    return kwargs


def build(cls: Any, case: Case, problem: Problem, **extra: Any) -> Any:
    """An optimizer of class `cls` on the problem's parameters."""
    return cls([dict(group) for group in problem.groups], **arguments(case), **extra)


def configs_of(case: Case) -> list[OracleConfig]:
    """The oracle's hyper-parameters of every group."""
    config = case.optimizer.config
    return [config({**case.kwargs, **group}) for group in case.groups]


def stored(opt: torch.optim.Optimizer, cohort: Cohort, key: str) -> Array | None:
    """One state of all the cohort's parameters, or None while it does not exist."""
    values = [opt.state.get(p, {}).get(key) for p in cohort.params]
    return None if any(value is None for value in values) else vector(values)


def has_begun(opt: torch.optim.Optimizer, cohort: Cohort, key: str) -> bool:
    """Whether a gradient has entered a state that torch has not before; until then it is zeros."""
    for state in (opt.state.get(p, {}) for p in cohort.params):
        value, step = state.get(key), float(state.get("step", 1.0))
        if step == 0.0 and (value is None or (value.numel() > 0 and not bool(value.any()))):
            return False
    return True


def stored_emas(opt: torch.optim.Optimizer, cohort: Cohort, count: int) -> tuple[Array, ...]:
    """The EMAs, or the weights where they are not created yet."""
    keys = ["ema" if index == 0 else f"ema_{index}" for index in range(count)]
    weights = vector(cohort.params)
    found = [stored(opt, cohort, key) for key in keys]
    return tuple(weights if ema is None else ema for ema in found)


def synchronised(
    opt: torch.optim.Optimizer, cohort: Cohort, carried: OracleState, config: OracleConfig
) -> OracleState:
    """The oracle's state with every array replaced by what the optimizer holds."""
    fresh = initial_state(config, vector(cohort.params))
    held = {key: stored(opt, cohort, key) for key in STATE_NAMES}
    for key in config.late_states:
        if not has_begun(opt, cohort, key):
            held[key] = None
    states = {k: fresh.states.get(k) if value is None else value for k, value in held.items()}
    emas = stored_emas(opt, cohort, len(config.ema_decay))
    return replace(carried, param=fresh.param, emas=emas, states=states)


@dataclass
class Follower:
    """The oracle beside one cohort.

    exact, bounds: the trajectory without roundings, and error bounds of a rounded one.
    held: what the optimizer stores, with the oracle's own clock and products of betas.
    """

    cohort: Cohort
    config: OracleConfig
    exact: OracleState
    bounds: Bounds
    held: OracleState

    @classmethod
    def start(cls, cohort: Cohort, config: OracleConfig) -> Follower:
        state = initial_state(config, vector(cohort.params))
        return cls(cohort, config, state, no_error(state), state)

    @property
    def has_trajectory(self) -> bool:
        """Whether nothing is stored in fewer bits than it is computed in."""
        return COMPUTE_OF[self.cohort.dtype] == self.cohort.dtype

    def advance(self, grad: Array | None) -> None:
        after = oracle_step(self.config, self.exact, grad)
        if self.has_trajectory:
            dtype = self.cohort.dtype
            self.bounds = propagate(self.config, self.exact, grad, self.bounds, after, dtype)
        self.exact = after

    def check_step(self, opt: torch.optim.Optimizer, grad: Array | None, context: str) -> Ratios:
        """Checks the optimizer's last step from what it held before; `exact` is past it."""
        before = self.held
        self.held = synchronised(opt, self.cohort, self.exact, self.config)
        return assert_local(self.config, before, grad, self.held, self.cohort.dtype, context)

    def check_trajectory(self, opt: torch.optim.Optimizer, context: str) -> Ratios:
        actual = synchronised(opt, self.cohort, self.exact, self.config)
        return assert_trajectory(actual, self.exact, self.bounds, self.cohort.dtype, context)

    def check_twin(self, opt: torch.optim.Optimizer, twin: Follower, theirs: Any) -> Ratios:
        """Two rounded implementations: each is within the bounds, so they are within twice that."""
        actual = synchronised(opt, self.cohort, self.exact, self.config)
        other = synchronised(theirs, twin.cohort, self.exact, self.config)
        return assert_trajectory(actual, other, self.bounds, self.cohort.dtype, "against torch", 2)


def set_kappa(case: Case, opt: Any, followers: list[Follower], step: int) -> None:
    if step not in case.kappas:
        return
    opt.kappa = case.kappas[step]
    for follower in followers:
        follower.config = replace(follower.config, kappa=case.kappas[step])


def start_followers(case: Case, problem: Problem) -> list[Follower]:
    configs = configs_of(case)
    return [Follower.start(cohort, configs[cohort.group]) for cohort in problem.cohorts]


def follow(
    opt: Any, case: Case, problem: Problem, steps: int, taken: Taken | None = None
) -> list[Follower]:
    """Checks every step, and the trajectory where no weight is rounded to 16 bits.

    taken: what the rule is to take of a step's gradients, if not the gradients as they are.
    """
    followers = start_followers(case, problem)
    for step in range(steps):
        set_kappa(case, opt, followers, step)
        grads = problem.set_gradients(step)
        opt.step()
        if taken is not None:
            grads = taken(grads, [cohort.dtype for cohort in problem.cohorts])
        for follower, grad in zip(followers, grads, strict=True):
            follower.advance(grad)
            follower.check_step(opt, grad, f"step {step}, group {follower.cohort.group}")
    for follower in followers:
        if follower.has_trajectory:
            context = f"after {steps} steps, group {follower.cohort.group}"
            follower.check_trajectory(opt, context)
    return followers
