"""Every rule, flag, dtype and backend against the float64 oracles and against torch.optim."""

from __future__ import annotations

import pytest
import torch
from cases import (
    ALL_CASES,
    DTYPES,
    EXACT_DTYPES,
    FEW,
    FLAG_CASES,
    LARGE,
    LARGE_CASES,
    SHAPE_CASES,
    SHAPE_SETS,
    Case,
    by_name,
)
from harness import Follower, Problem, build, follow, make_problem, start_followers

STEPS = 50


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def ours(case: Case, problem: Problem, backend: str):
    return build(case.optimizer.ours, case, problem, backend=backend)


def theirs(case: Case, problem: Problem):
    return build(case.torch, case, problem, foreach=False)


def parameters(problem: Problem) -> list[torch.nn.Parameter]:
    return [p for group in problem.groups for p in group["params"]]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_steps_and_trajectory_match_the_oracle(case, dtype, backend):
    problem = make_problem(case, FEW, [dtype], STEPS)
    opt = ours(case, problem, backend)
    followers = follow(opt, case, problem, STEPS)
    assert set(opt.backends) == {backend}
    check_clocks(opt, followers)


def check_clocks(opt, followers: list[Follower]) -> None:
    """base_steps of a group is the samples seen over the base batch size."""
    for follower in followers:
        group = opt.param_groups[follower.cohort.group]
        assert group["base_steps"] == pytest.approx(follower.exact.clock, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shapes", SHAPE_SETS.values(), ids=SHAPE_SETS.keys())
@pytest.mark.parametrize("case", SHAPE_CASES, ids=str)
def test_shapes_match_the_oracle(case, shapes, dtype, backend):
    problem = make_problem(case, shapes, [dtype], steps=4)
    follow(ours(case, problem, backend), case, problem, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_more_than_one_chunk_matches_the_oracle(case, dtype, backend):
    problem = make_problem(case, LARGE, [dtype], steps=3)
    follow(ours(case, problem, backend), case, problem, 3)


@pytest.mark.parametrize("case", SHAPE_CASES, ids=str)
def test_dtypes_mix_in_one_group(case, backend):
    problem = make_problem(case, FEW, DTYPES, steps=10)
    follow(ours(case, problem, backend), case, problem, 10)


@pytest.mark.parametrize("name", ["SGD-ema", "Adam-amsgrad", "AdamW-triple"])
def test_gradients_with_other_strides(name, backend):
    """Gradients need not be laid out like their parameters."""
    case = by_name(name)
    plain, strided = (make_problem(case, [(2, 5, 3, 3), (6, 4)], [torch.float32], 5) for _ in "ab")
    first, second = (ours(case, problem, backend) for problem in (plain, strided))
    for step in range(5):
        plain.set_gradients(step)
        strided.set_gradients(step)
        for p in parameters(strided):
            p.grad = restrided(p.grad)
        first.step()
        second.step()
    for p, q in zip(parameters(plain), parameters(strided), strict=True):
        assert torch.equal(p, q)
        for key, value in second.state[q].items():
            assert torch.equal(first.state[p][key], value), key


def restrided(grad: torch.Tensor) -> torch.Tensor:
    backwards = tuple(reversed(range(grad.dim())))
    return grad.permute(backwards).contiguous().permute(backwards)


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=name_of)
@pytest.mark.parametrize("case", FLAG_CASES, ids=str)
def test_trajectory_matches_torch(case, dtype, backend):
    """Without EMA and at kappa = 1 the optimizers are torch's."""
    problem, twin = (make_problem(case, FEW, [dtype], STEPS) for _ in "ab")
    opt, torch_opt = ours(case, problem, backend), theirs(case, twin)
    followers, twins = start_followers(case, problem), start_followers(case, twin)
    for step in range(STEPS):
        twin.set_gradients(step)
        for follower, grad in zip(followers, problem.set_gradients(step), strict=True):
            follower.advance(grad)
        opt.step()
        torch_opt.step()
    for follower, other in zip(followers, twins, strict=True):
        follower.check_twin(opt, other, torch_opt)


@pytest.mark.parametrize("name", ["Adam-default", "AdamW-none-gradients"])
def test_step_counts_match_torch(name, backend):
    case = by_name(name)
    problem, twin = (make_problem(case, FEW, [torch.float32], STEPS) for _ in "ab")
    opt, torch_opt = ours(case, problem, backend), theirs(case, twin)
    for step in range(STEPS):
        problem.set_gradients(step)
        twin.set_gradients(step)
        opt.step()
        torch_opt.step()
    for p, q in zip(parameters(problem), parameters(twin), strict=True):
        assert float(opt.state[p]["step"]) == float(torch_opt.state[q]["step"])


@pytest.mark.parametrize("name", ["Adam-kappa-changes", "AdamW-ema-none-gradients"])
def test_step_counts_base_steps_with_a_gradient(name, backend):
    """state["step"] grows by kappa at every step that has a gradient."""
    case = by_name(name)
    problem = make_problem(case, FEW, [torch.float32], STEPS)
    opt = ours(case, problem, backend)
    expected = [0.0] * len(problem.cohorts)
    for step in range(STEPS):
        opt.kappa = case.kappas.get(step, opt.kappa)
        grads = problem.set_gradients(step)
        expected = [n + (g is not None) * opt.kappa for n, g in zip(expected, grads, strict=True)]
        opt.step()
    for cohort, count in zip(problem.cohorts, expected, strict=True):
        for p in cohort.params:
            assert float(opt.state[p]["step"]) == pytest.approx(count, rel=1e-12)


@pytest.mark.parametrize("name", ["SGD-dampening", "SGD-none-gradients"])
def test_momentum_without_a_gradient_continues_in_torch(name, backend):
    """A state saved before a parameter's first gradient does not damp that gradient in torch."""
    case = by_name(name)
    problem, twin = (make_problem(case, FEW, [torch.float64], STEPS) for _ in "ab")
    opt, torch_opt = ours(case, problem, backend), theirs(case, twin)
    opt.step()
    torch_opt.load_state_dict(opt.state_dict())
    followers = start_followers(case, twin)
    for step in range(3, 8):
        for follower, grad in zip(followers, twin.set_gradients(step), strict=True):
            follower.advance(grad)
        torch_opt.step()
    for follower in followers:
        follower.check_trajectory(torch_opt, "torch, continued")
