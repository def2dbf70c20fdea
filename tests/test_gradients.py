"""Gradients on their way into the rule: clipped, unscaled, or not taken at all."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import twins
from cases import CHANNELS_LAST, CHUNK, FEW, by_name
from graphs import Graph
from harness import build, follow, make_problem
from tolerances import COMPUTE_OF, NORM, UNIT
from torch import nn

import fused_ema
from fused_ema.step import gradients, plans

SHAPES = (*FEW, (CHUNK + 5,), CHANNELS_LAST[0])
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Taken:
    """What a clipped step takes of its gradients, in numpy.

    The norm is checked against an exact one; the factor follows from the one that was reported, for
    an error in it would be multiplied into everything.
    """

    def __init__(self, opt, max_norm: float, scale: float = 1.0) -> None:
        self.opt, self.max_norm, self.scale = opt, max_norm, scale
        self.coefficients: list[float] = []

    def __call__(self, grads, dtypes):
        exact = math.sqrt(sum(float(np.square(g).sum()) for g in grads if g is not None))
        unit = max(UNIT[COMPUTE_OF[dtype]] for dtype in dtypes)
        norm = float(self.opt.grad_norm)
        assert norm == pytest.approx(exact / self.scale, rel=NORM * unit, abs=0.0)
        self.coefficients.append(min(1.0, self.max_norm / (norm + 1e-6)))
        return [
            None if grad is None else times(grad, self.coefficients[-1] / self.scale, dtype)
            for grad, dtype in zip(grads, dtypes, strict=True)
        ]


def times(grad, factor: float, dtype: torch.dtype):
    compute = NUMPY[COMPUTE_OF[dtype]]
    return (grad.astype(compute) * compute(factor)).astype(np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["SGD-nesterov-decay-maximize", "SGD-scaled-groups", "AdamW-ema-none-gradients"]
)
def test_clipped_steps_match_the_oracle(name, dtype, backend):
    case = by_name(name)
    problem = make_problem(case, SHAPES, [dtype], 12)
    max_norm = 1.2 * math.sqrt(sum(p.numel() for c in problem.cohorts for p in c.params) / 2)
    opt = build(case.optimizer.ours, case, problem, backend=backend, max_grad_norm=max_norm)
    taken = Taken(opt, max_norm)
    follow(opt, case, problem, 12, taken)
    assert set(opt.backends) == {backend}
    assert min(taken.coefficients) < 1.0
    if case.none_rate:
        assert max(taken.coefficients) == 1.0


def test_one_norm_over_all_buckets(backend):
    case = by_name("AdamW-triple")
    problem = make_problem(case, FEW, [torch.float32, torch.float64, torch.float16], 6)
    opt = build(fused_ema.FusedScaledAdamW, case, problem, backend=backend, max_grad_norm=2.0)
    follow(opt, case, problem, 6, Taken(opt, 2.0))


def test_clipping_is_torchs(backend):
    """clip_grad_norm_ and an unclipped step; .grad stays as it was."""
    case = by_name("SGD-momentum")
    problem, other = (make_problem(case, SHAPES, [torch.float64], 5) for _ in range(2))
    opt = build(fused_ema.FusedScaledSGD, case, problem, backend=backend, max_grad_norm=3.0)
    twin = build(torch.optim.SGD, case, other)
    for step in range(5):
        problem.set_gradients(step)
        other.set_gradients(step)
        params = [p for c in problem.cohorts for p in c.params]
        before = [p.grad.clone() for p in params]
        norm = nn.utils.clip_grad_norm_([p for c in other.cohorts for p in c.params], 3.0)
        opt.step()
        twin.step()
        assert all(map(torch.equal, before, (p.grad for p in params)))
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-14, atol=0.0)
        for p, q in zip(params, (p for c in other.cohorts for p in c.params), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("max_norm", [0.0, math.inf])
def test_the_ends_of_the_range(max_norm, backend):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 2.0, 2.0])
    opt = fused_ema.FusedScaledSGD([p], lr=1.0, max_grad_norm=max_norm, backend=backend)
    opt.step()
    assert float(opt.grad_norm) == 3.0
    assert torch.equal(p.detach(), torch.ones(3) if max_norm == 0.0 else 1.0 - p.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_propagates_as_in_torch(bad, backend):
    params, others = ([nn.Parameter(torch.ones(3)) for _ in "ab"] for _ in "ab")
    opt = fused_ema.FusedScaledSGD(params, lr=1.0, max_grad_norm=1.0, backend=backend)
    twin = torch.optim.SGD(others, lr=1.0)
    for first, second in (params, others):
        first.grad, second.grad = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    nn.utils.clip_grad_norm_(others, 1.0)
    opt.step()
    twin.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True, rtol=0.0, atol=0.0)


def test_the_norm_is_there_only_where_asked_for():
    p = nn.Parameter(torch.ones(3))
    opt = fused_ema.FusedScaledSGD([p])
    assert opt.grad_norm is None
    opt.step()
    assert opt.grad_norm is None
    opt.max_grad_norm = 1.0
    opt.step()
    assert float(opt.grad_norm) == 0.0
    assert deepcopy(opt).max_grad_norm == 1.0


@pytest.mark.parametrize("bad", [-1.0, math.nan, "1"])
def test_a_bad_max_grad_norm_is_refused(bad):
    with pytest.raises(ValueError, match=r"max_grad_norm=.*allowed: 0\.0 <= max_grad_norm <= inf"):
        fused_ema.FusedScaledSGD([nn.Parameter(torch.ones(3))], max_grad_norm=bad)


def test_clipping_is_not_differentiable():
    leaf = torch.ones(2, requires_grad=True).clone()
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 with differentiable=True"):
        fused_ema.FusedScaledSGD([leaf], max_grad_norm=1.0, differentiable=True)


SCALE = 1024.0


def make_scaler(kind=torch.amp.GradScaler) -> torch.amp.GradScaler:
    scaler = kind("cpu", init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    return scaler


parameters = partial(twins.parameters, ((), (7,), (5, 3)), torch.float64)
SCALERS = pytest.mark.parametrize("kind", [torch.amp.GradScaler, fused_ema.GradScaler])


@SCALERS
@pytest.mark.parametrize("max_norm", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scaler_drives_the_step(dtype, max_norm, kind, backend):
    case = by_name("AdamW-triple")
    problem = make_problem(case, SHAPES, [dtype], 8)
    options = {"backend": backend, "max_grad_norm": max_norm, "fused": True}
    opt = build(fused_ema.FusedScaledAdamW, case, problem, **options)
    scaler = make_scaler(kind)

    class Scaled:
        param_groups = opt.param_groups
        state = opt.state

        def step(self):
            scaler.step(opt)
            scaler.update()

    clipped = Taken(opt, 2.0, SCALE)

    def taken(grads, dtypes):
        if max_norm is not None:
            return clipped(grads, dtypes)
        return [times(g, 1 / SCALE, d) for g, d in zip(grads, dtypes, strict=True)]

    follow(Scaled(), case, problem, 8, taken)


@SCALERS
@pytest.mark.parametrize("fused", [None, True])
def test_gradients_may_be_unscaled_before(fused, kind, backend):
    p, q = (nn.Parameter(torch.ones(3)) for _ in "ab")
    opt = fused_ema.FusedScaledSGD([p], lr=1.0, ema_decay=0.5, backend=backend, fused=fused)
    twin = fused_ema.FusedScaledSGD([q], lr=1.0, ema_decay=0.5)
    p.grad, q.grad = torch.full((3,), 0.5 * SCALE), torch.full((3,), 0.5)
    scaler = make_scaler(kind)
    scaler.unscale_(opt)
    scaler.step(opt)
    twin.step()
    assert torch.equal(p, q)
    assert torch.equal(opt.state[p]["ema"], twin.state[q]["ema"])


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_our_scaler_reads_gradients_twice_and_writes_none(max_norm, monkeypatch):
    passes = []

    class Counted(plans.Plans):
        def control(self, treatment):
            passes.append("squares" if treatment.measures else "control")
            return super().control(treatment)

        def running(self, control):
            passes.append("step")
            return super().running(control)

    monkeypatch.setattr("fused_ema.step.stepper.Plans", Counted)
    params = parameters()
    opt = fused_ema.FusedScaledAdamW(params, ema_decay=0.9, max_grad_norm=max_norm)
    scaler = make_scaler(fused_ema.GradScaler)
    for step in range(2):
        twins.set_gradients(step, params)
        versions = [p.grad._version for p in params]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            scaler.step(opt)
        scaler.update()
        assert passes == ["squares", "step"] * (step + 1)
        assert [p.grad._version for p in params] == versions
        assert not any("non_finite" in event.key for event in profile.key_averages())


def test_our_scaler_drives_other_optimizers_too():
    (p,) = parameters()[1:2]
    opt = torch.optim.AdamW([p], fused=True)
    scaler = make_scaler(fused_ema.GradScaler)
    p.grad = torch.full_like(p, math.inf)
    before = p.detach().clone()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(p, before)
    assert scaler.get_scale() == SCALE / 2


def bits(opt, model) -> list[torch.Tensor]:
    """All that a step may move."""
    opt.state_dict()  # counts that are in doubt are settled
    counts = [torch.as_tensor(group["base_steps"]) for group in opt.param_groups]
    held = [t for average in opt._buffers.averages for t in average.values()]
    values = [t for state in opt.state.values() for t in state.values()]
    states = [t for t in values if isinstance(t, torch.Tensor)]
    return [t.clone() for t in (*model.parameters(), *states, *held, *counts)]


@SCALERS
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_skipped_step_moves_nothing(buffers, capturable, kind, backend):
    if capturable and backend not in ("triton", "shim"):
        pytest.skip("needs a backend that folds on the device")
    model = nn.BatchNorm1d(4)
    teacher = deepcopy(model)
    options = {"teacher": teacher, "ema_buffers": buffers, "model": model, "capturable": capturable}
    options |= {"fused": True}
    opt = fused_ema.FusedScaledAdamW(
        model.parameters(), ema_decay=0.9, kappa=2.0, max_grad_norm=1.0, backend=backend, **options
    )
    scaler = make_scaler(kind)
    for step in range(4):
        opt.zero_grad()
        scaler.scale(model(torch.randn(8, 4)).square().sum()).backward()
        if step in (0, 2):
            model.weight.grad[1] = math.inf
        before = bits(opt, model) if step else []
        scaler.step(opt)
        scaler.update()
        moved = [not torch.equal(a, b) for a, b in zip(before, bits(opt, model), strict=False)]
        assert any(moved) is (step in (1, 3))
        assert float(opt.state[model.weight]["step"] if opt.state else 0.0) == (0, 2, 2, 4)[step]
    assert scaler.get_scale() == SCALE / 4


@pytest.mark.parametrize("every", [1, 2])
def test_counts_of_a_skipped_step_are_taken_back_later(every, backend, monkeypatch):
    """A step does not look at its own found_inf where the kernels do."""
    asked = []

    class Watched(gradients.Verdict):
        def skipped(self):
            asked.append(self)
            return super().skipped()

    monkeypatch.setattr("fused_ema.optim.stepping.Verdict", Watched)
    params, others = parameters(), parameters()
    options = {"ema_decay": lambda t: 1 - 0.5 / (1 + t), "kappa": 2.0, "ema_every": every}
    opt = fused_ema.FusedScaledAdamW(params, backend=backend, **options)
    twin = fused_ema.FusedScaledAdamW(others, **options)
    opt.found_inf = torch.tensor(0.0)
    for step, found_inf in enumerate((1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)):
        twins.set_gradients(step, params, others)
        opt.found_inf.fill_(found_inf)
        opt.step()
        assert len(asked) == (step if backend in ("triton", "shim") else 0)
        opt.found_inf.fill_(0.0)  # the verdict is a copy
        if not found_inf:
            twin.step()
    twins.assert_same(opt, twin, rtol=1e-12, atol=1e-14)
    assert opt.param_groups[0]["base_steps"] == 8.0


def test_a_count_that_the_user_wrote_is_not_taken_back(backend):
    p = nn.Parameter(torch.ones(3))
    opt = fused_ema.FusedScaledAdam([p], backend=backend)
    p.grad = torch.ones(3)
    opt.step()
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    opt.state[p]["step"].fill_(7.0)
    opt.state_dict()
    assert opt.state[p]["step"] == 7.0


def test_a_replayed_graph_clips_and_skips(monkeypatch):
    params, others = parameters(), parameters()
    options = {"ema_decay": 0.9, "max_grad_norm": 1.0, "weight_decay": 0.1}
    opt = fused_ema.FusedScaledAdamW(params, capturable=True, backend="triton", **options)
    twin = fused_ema.FusedScaledAdamW(others, **options)
    opt.grad_scale = torch.tensor(8.0)
    opt.found_inf = torch.tensor(0.0)
    graph = Graph(monkeypatch)
    for step, found_inf in enumerate((0.0, 0.0, 1.0, 0.0)):
        twins.set_gradients(step, params, others)
        for p in params:
            p.grad.mul_(8.0)
        opt.found_inf.fill_(found_inf)
        if step == 1:
            graph.capture(opt)
        opt.step() if step == 0 else graph.replay()
        if not found_inf:
            twin.step()
            torch.testing.assert_close(opt.grad_norm, twin.grad_norm, rtol=1e-14, atol=0.0)
        twins.assert_same(opt, twin, rtol=1e-12, atol=1e-14)
