"""The oracles against torch.optim in float64, and the bounds against deliberate mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALL_CASES, EXACT_DTYPES, FEW, FLAG_CASES, Case, by_name
from harness import (
    build,
    configs_of,
    make_problem,
    set_kappa,
    start_followers,
    vector,
)
from oracles import OracleConfig, OracleState, Scalars, initial_state, oracle_step
from oracles.adam import Adam
from tolerances import (
    assert_local,
    assert_trajectory,
    half_ulp,
    no_error,
    propagate,
)

STEPS = 50
# torch's foreach optimizers take no tensor lr
FLOAT_RATE_CASES = tuple(case for case in FLAG_CASES if not case.tensor_lr)
Step = Callable[[OracleConfig, OracleState, np.ndarray | None], OracleState]


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
@pytest.mark.parametrize("case", FLAG_CASES, ids=str)
def test_oracle_matches_torch(case, dtype):
    problem = make_problem(case, FEW, [dtype], STEPS)
    opt = build(case.torch, case, problem, foreach=False)
    followers = start_followers(case, problem)
    for step in range(STEPS):
        for follower, grad in zip(followers, problem.set_gradients(step), strict=True):
            follower.advance(grad)
        opt.step()
    for follower in followers:
        follower.check_trajectory(opt, "torch")


@pytest.mark.parametrize("case", FLOAT_RATE_CASES, ids=str)
def test_torch_foreach_is_within_the_bounds_too(case):
    """The bounds hold for every order of evaluation, not just for one implementation."""
    problem = make_problem(case, FEW, [torch.float32], STEPS)
    opt = build(case.torch, case, problem, foreach=True)
    followers = start_followers(case, problem)
    for step in range(STEPS):
        for follower, grad in zip(followers, problem.set_gradients(step), strict=True):
            follower.advance(grad)
        opt.step()
    for follower in followers:
        follower.check_trajectory(opt, "torch foreach")


def with_scale(change: Callable[[Any, Any], Scalars]) -> Step:
    """A step whose scalars are wrong by `change`."""

    def step(config, state, grad):
        wrong = change(config, config.scale(state.clock))
        return oracle_step(config, state, grad, scalars=wrong)

    return step


def with_config(**changes) -> Step:
    return lambda config, state, grad: oracle_step(replace(config, **changes), state, grad)


def log_betas(config: OracleConfig) -> tuple[float, float]:
    return tuple(math.log(beta) if beta else -math.inf for beta in config.betas)


def unscaled_ema(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, ema_weights=tuple(1 - decay for decay in config.ema_decay))


def linear_ema(config: OracleConfig, scalars: Scalars) -> Scalars:
    weights = tuple(config.kappa * (1 - decay) for decay in config.ema_decay)
    return replace(scalars, ema_weights=weights)


def unscaled_beta1(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, log_beta1=log_betas(config)[0])


def unscaled_beta2(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, log_beta2=log_betas(config)[1])


def linear_betas(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(config, beta_scaling="linear").scale(0.0)


def unscaled_alpha(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, log_alpha=math.log(config.alpha))


def entry_of_one(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, entry=1.0)


def unscaled_eps(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, eps=config.eps)


def linear_rate(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, lr=config.kappa * config.lr)


def root_sgd_rate(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, lr=math.sqrt(config.kappa) * config.lr)


def decay_of_scaled_rate(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, keep=1 - scalars.lr * config.weight_decay)


def scaled_l2(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, l2=config.weight_decay * math.sqrt(config.kappa))


def unscaled_momentum(config: OracleConfig, scalars: Scalars) -> Scalars:
    return replace(scalars, momentum=config.momentum)


def eps_before_bias_correction(config, state, grad):
    """eps in place of eps sqrt(1 - beta2^t) beside the uncorrected square average."""
    log_product2 = state.carried["log_product2"] + config.scale(state.clock).log_beta2
    bc2 = -math.expm1(log_product2)
    return oracle_step(replace(config, eps=config.eps / math.sqrt(bc2)), state, grad)


def dampened_first_step(config, state, grad):
    if state.states["momentum_buffer"] is None:
        state = state.with_states(momentum_buffer=np.zeros_like(state.param))
    return oracle_step(config, state, grad)


def skipped_ema(config, state, grad):
    """As torch: a parameter without a gradient is left out altogether."""
    after = oracle_step(config, state, grad)
    return after if grad is not None else replace(after, emas=state.emas)


def frozen_clock(config, state, grad):
    return replace(oracle_step(config, state, grad), clock=0.0)


def clock_of_steps(config, state, grad):
    after = oracle_step(config, state, grad)
    return replace(after, clock=state.clock + 1.0)


def correction_of_last_beta(config, state, grad):
    """beta^(number of steps) at the present kappa, not the product of the betas used."""
    steps = state.clock  # counts steps here
    logs = [steps * config.scaled_log_beta(beta) for beta in config.betas]
    wrong = replace(state, carried={"log_product1": logs[0], "log_product2": logs[1]})
    return replace(oracle_step(config, wrong, grad), clock=steps + 1)


def no_bias_correction1(config, state, grad):
    carried = {**state.carried, "log_product1": -math.inf}
    return oracle_step(config, replace(state, carried=carried), grad)


def forgotten_mean(config, state, grad):
    zero = np.zeros_like(state.param)
    return oracle_step(config, state.with_states(grad_avg=zero), grad)


def forgotten_maximum(config, state, grad):
    zero = np.zeros_like(state.param)
    return oracle_step(config, state.with_states(max_exp_avg_sq=zero), grad)


@dataclass(frozen=True)
class Mutation:
    """A mistake, a case that shows it, and a field that must leave its bound."""

    name: str
    case: str
    field: str
    step: Step

    def __str__(self) -> str:
        return f"{self.name}-{self.case}"


MUTATIONS = (
    Mutation("unscaled ema", "SGD-half", "EMA 0", with_scale(unscaled_ema)),
    Mutation("unscaled ema", "AdamW-eightfold", "EMA 0", with_scale(unscaled_ema)),
    Mutation("1 - kappa (1 - rho)", "Adam-eightfold", "EMA 0", with_scale(linear_ema)),
    Mutation("1 - kappa (1 - rho)", "SGD-half", "EMA 0", with_scale(linear_ema)),
    Mutation("beta1 not scaled", "Adam-half", "exp_avg", with_scale(unscaled_beta1)),
    Mutation("beta2 not scaled", "Adam-half", "exp_avg_sq", with_scale(unscaled_beta2)),
    Mutation("beta2 not scaled", "AdamW-eightfold", "exp_avg_sq", with_scale(unscaled_beta2)),
    Mutation("linear betas", "AdamW-half", "exp_avg", with_scale(linear_betas)),
    Mutation("eps not scaled", "Adam-half", "param", with_scale(unscaled_eps)),
    Mutation("eps not scaled", "AdamW-eightfold", "param", with_scale(unscaled_eps)),
    Mutation("eps without sqrt(bc2)", "Adam-eps", "param", eps_before_bias_correction),
    Mutation("eps without sqrt(bc2)", "AdamW-triple", "param", eps_before_bias_correction),
    Mutation("no bias correction", "Adam-default", "param", no_bias_correction1),
    Mutation("last correction", "Adam-kappa-changes", "param", correction_of_last_beta),
    Mutation("linear rate", "AdamW-half", "param", with_scale(linear_rate)),
    Mutation("linear rate", "RMSprop-half", "param", with_scale(linear_rate)),
    Mutation("alpha not scaled", "RMSprop-half", "square_avg", with_scale(unscaled_alpha)),
    Mutation("alpha not scaled", "RMSprop-eightfold", "grad_avg", with_scale(unscaled_alpha)),
    Mutation("eps not scaled", "RMSprop-half", "param", with_scale(unscaled_eps)),
    Mutation("no mean", "RMSprop-ema", "param", forgotten_mean),
    Mutation("root rate", "SGD-half", "param", with_scale(root_sgd_rate)),
    Mutation("decay 1 - scaled rate", "AdamW-half", "param", with_scale(decay_of_scaled_rate)),
    Mutation("decay 1 - scaled rate", "AdamW-eightfold", "param", with_scale(decay_of_scaled_rate)),
    Mutation("scaled L2", "SGD-eightfold", "param", with_scale(scaled_l2)),
    Mutation("scaled L2", "Adam-half", "param", with_scale(scaled_l2)),
    Mutation("decoupled for L2", "Adam-decay", "param", with_config(decoupled=True)),
    Mutation("L2 for decoupled", "AdamW-decay", "param", with_config(decoupled=False)),
    Mutation("momentum not scaled", "SGD-exact", "param", with_scale(unscaled_momentum)),
    Mutation("momentum not scaled", "RMSprop-exact", "param", with_scale(unscaled_momentum)),
    Mutation("entry not scaled", "RMSprop-exact", "momentum_buffer", with_scale(entry_of_one)),
    Mutation("dampened first step", "SGD-dampening", "param", dampened_first_step),
    Mutation("no nesterov", "SGD-nesterov", "param", with_config(nesterov=False)),
    Mutation("no maximize", "SGD-maximize", "param", with_config(maximize=False)),
    Mutation("no maximize", "AdamW-maximize", "param", with_config(maximize=False)),
    Mutation("no amsgrad", "Adam-amsgrad", "param", forgotten_maximum),
    Mutation("no ratio", "LARS-half", "param", with_config(adapt=False)),
    Mutation("no ratio", "LAMB-half", "param", with_config(adapt=False)),
    Mutation("root rate", "LARS-half", "param", with_scale(root_sgd_rate)),
    Mutation("linear rate", "LAMB-half", "param", with_scale(linear_rate)),
    Mutation("beta2 not scaled", "LAMB-half", "exp_avg_sq", with_scale(unscaled_beta2)),
    Mutation("ema of weights before", "SGD-ema", "EMA 0", with_config(ema_order="before")),
    Mutation("ema of weights after", "AdamW-ema-before", "EMA 0", with_config(ema_order="after")),
    Mutation("ema skipped", "SGD-ema-none-gradients", "EMA 0", skipped_ema),
    Mutation("ema skipped", "AdamW-ema-none-gradients", "EMA 0", skipped_ema),
    Mutation("frozen schedule", "SGD-schedule", "EMA 0", frozen_clock),
    Mutation("schedule of steps", "Adam-schedule", "EMA 0", clock_of_steps),
)


def arrays_from(mutant: OracleState, carried: OracleState) -> OracleState:
    """What a test sees of an optimizer: its arrays; clock and products are the oracle's own."""
    return replace(mutant, clock=carried.clock, carried=carried.carried)


def run_beside(case: Case, step: Step, dtype: torch.dtype, local: bool) -> None:
    """Follows `step` in exact arithmetic, with the checks that an optimizer gets."""
    problem = make_problem(case, FEW, [torch.float32], STEPS)
    (follower, *_) = start_followers(case, problem)
    seen = follower.exact
    for index in range(STEPS):
        set_kappa(case, type("Ignored", (), {})(), [follower], index)
        grad, *_ = problem.set_gradients(index)
        before = arrays_from(seen, follower.exact)
        seen = step(follower.config, seen, grad)
        if local:
            assert_local(follower.config, before, grad, seen, dtype)
        follower.advance(grad)
    assert_trajectory(seen, follower.exact, follower.bounds, dtype)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_exact_steps_pass_every_check(case):
    run_beside(case, oracle_step, torch.float64, local=True)


@pytest.mark.parametrize("local", [True, False], ids=["local", "trajectory"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mistakes_leave_the_float32_bounds(mutation, local):
    kind = "local" if local else "trajectory"
    with pytest.raises(AssertionError, match=rf"(?s)\({kind}\)\n.*{mutation.field}: element"):
        run_beside(by_name(mutation.case), mutation.step, torch.float32, local)


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(x).to(dtype).double().numpy()


def truncated(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounds towards zero."""
    near = rounded(x, dtype)
    toward_zero = torch.nextafter(torch.from_numpy(near).to(dtype), torch.zeros((), dtype=dtype))
    return np.where(np.abs(near) > np.abs(x), toward_zero.double().numpy(), near)


def stored_step(state: OracleState, round_to: Callable, dtype: torch.dtype) -> OracleState:
    """A step whose weights and moments are stored in a 16-bit format."""
    held = {k: None if x is None else round_to(x, dtype) for k, x in state.states.items()}
    return replace(state, param=round_to(state.param, dtype), states=held)


def first_steps(dtype: torch.dtype) -> tuple[OracleConfig, OracleState, np.ndarray]:
    """A state after three steps in 16 bits, and the next gradient."""
    case = by_name("AdamW-ema")
    problem = make_problem(case, [(1000,)], [dtype], STEPS)
    config = configs_of(case)[0]
    state = initial_state(config, vector(problem.cohorts[0].params))
    for index in range(3):
        state = oracle_step(config, state, problem.set_gradients(index)[0])
        state = stored_step(state, rounded, dtype)
    return config, state, problem.set_gradients(3)[0]


SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@SIXTEEN_BITS
def test_rounding_to_nearest_is_within_bounds(dtype):
    config, state, grad = first_steps(dtype)
    exact = oracle_step(config, state, grad)
    actual = stored_step(exact, rounded, dtype)
    seen = oracle_step(config, state, grad, seen=actual.param)
    assert_local(config, state, grad, replace(actual, emas=seen.emas), dtype)


@SIXTEEN_BITS
def test_truncation_leaves_the_bounds(dtype):
    config, state, grad = first_steps(dtype)
    actual = stored_step(oracle_step(config, state, grad), truncated, dtype)
    with pytest.raises(AssertionError, match="param: element"):
        assert_local(config, state, grad, actual, dtype)


@SIXTEEN_BITS
def test_ema_of_unrounded_weights_leaves_the_bounds(dtype):
    config, state, grad = first_steps(dtype)
    actual = stored_step(oracle_step(config, state, grad), rounded, dtype)
    with pytest.raises(AssertionError, match="EMA 0: element"):
        assert_local(config, state, grad, actual, dtype)


@SIXTEEN_BITS
def test_moments_rounded_before_use_leave_the_bounds(dtype):
    """The update reads the moments of the compute format, not the stored ones."""
    config, state, grad = first_steps(dtype)
    exact = oracle_step(config, state, grad)
    bc1, bc2 = (-math.expm1(exact.carried[f"log_product{k}"]) for k in (1, 2))
    scalars = config.scale(state.clock)
    mean = rounded(exact.states["exp_avg"], dtype) / bc1
    root = np.sqrt(rounded(exact.states["exp_avg_sq"], dtype) / bc2)
    param = scalars.keep * state.param - scalars.lr * mean / (root + scalars.eps)
    actual = stored_step(replace(exact, param=param), rounded, dtype)
    with pytest.raises(AssertionError, match="param: element"):
        assert_local(config, state, grad, actual, dtype)


def test_half_ulp_is_half_the_gap():
    x = torch.tensor([0.0, 1.0, 1.5, 1.999, 2.0, 3e-8, 1e-5, 65504.0], dtype=torch.float16)
    gap = torch.nextafter(x[:-1], torch.tensor(9e4, dtype=torch.float16)).double() - x[:-1].double()
    np.testing.assert_array_equal(half_ulp(x[:-1].double().numpy(), torch.float16), gap.numpy() / 2)
    assert half_ulp(np.array([65504.0]), torch.float16) == 16.0


def test_linear_scaling_refuses_negative_betas():
    config = Adam(betas=(0.9, 0.999), beta_scaling="linear", kappa=11.0)
    with pytest.raises(ValueError, match="linear scaling"):
        oracle_step(config, initial_state(config, np.zeros(2)), np.ones(2))


def test_bounds_grow_at_most_linearly():
    """Errors of momentum, decay and EMA add up; the bound after T steps is about T of one."""
    case = by_name("SGD-ema")
    problem = make_problem(case, [(1000,)], [torch.float32], 100)
    config = configs_of(case)[0]
    state = initial_state(config, vector(problem.cohorts[0].params))
    bounds, widest = no_error(state), []
    for index in range(100):
        grad = problem.set_gradients(index)[0]
        after = oracle_step(config, state, grad)
        bounds = propagate(config, state, grad, bounds, after, torch.float32)
        state = after
        widest.append(bounds.param.max() / np.abs(state.param).max())
    assert widest[-1] < 100 * 4 * 2.0**-24
    assert widest[-1] < 2.5 * widest[49]
