"""SGD's momentum through changes of kappa, against closed forms, in float64."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from graphs import Graph
from torch import nn

from fused_ema import FusedScaledSGD, GradScaler

MU, LR = 0.9, 0.1
PATH = (1.0, 8.0, 8.0, 0.5, 3.0, 1.0, 64.0, 1.0)


def zeros(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(count)]


def step(opt, params, *grads: float | None) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else torch.full_like(p, grad)
    opt.step()


exact = partial(FusedScaledSGD, lr=LR, momentum=MU, momentum_scaling="exact")


def entered(kappa: float) -> float:
    """What kappa gradients of 1 leave in a buffer of the base batch."""
    return (1 - MU**kappa) / (1 - MU)


def same(p, expected: float) -> None:
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_velocity_follows_kappa_at_once(nesterov, backend):
    """At rest in the frame of a constant gradient every step is kappa lr g/(1 - mu) long."""
    (p,) = params = zeros()
    opt = exact(params, nesterov=nesterov, backend=backend)
    step(opt, params, 2.0)
    opt.state[p]["momentum_buffer"].fill_(2.0 / (1 - MU))
    for kappa in PATH:
        opt.kappa = kappa
        before = p.detach().clone()
        step(opt, params, 2.0)
        same(p - before, -kappa * LR * 2.0 / (1 - MU))


def test_without_gradients_the_buffer_forgets_by_samples(backend):
    """After an impulse the buffer is mu to the power of the samples since, at any kappas."""
    (p,) = params = zeros()
    opt = exact(params, kappa=4.0, backend=backend)
    step(opt, params, 1.0)
    samples, moved = 0.0, 4.0 * LR * entered(4.0)
    same(p, -moved)
    for kappa in PATH:
        opt.kappa = kappa
        step(opt, params, 0.0)
        samples += kappa
        moved += kappa * LR * entered(4.0) * MU**samples
        same(p, -moved)


def test_a_parameter_without_a_gradient_at_the_change(backend):
    """It takes its momentum along at its own next step, by its own samples."""
    params = zeros(2)
    opt = exact(params, backend=backend)
    step(opt, params, 1.0, 1.0)
    opt.kappa = 8.0
    step(opt, params, 0.0, None)
    opt.kappa = 2.0
    step(opt, params, 0.0, 0.0)
    same(params[0], -LR * (1 + 8 * MU**8 + 2 * MU**10))
    same(params[1], -LR * (1 + 2 * MU**2))


def test_groups_change_apart(backend):
    first, second = zeros(2)
    opt = exact([{"params": [first]}, {"params": [second], "kappa": 4.0}], backend=backend)
    step(opt, [first, second], 1.0, 1.0)
    opt.param_groups[0]["kappa"] = 3.0
    step(opt, [first, second], 0.0, 0.0)
    same(first, -LR * (1 + 3 * MU**3))
    same(second, -LR * 4 * entered(4.0) * (1 + MU**4))


def test_a_change_across_a_checkpoint():
    """Also into torch's SGD at the base batch, and from it: the buffer is the base batch's."""
    params, others, torchs, backs = (zeros() for _ in range(4))
    opt, other = exact(params, kappa=8.0), exact(others)
    step(opt, params, 1.0)
    other.load_state_dict(deepcopy(opt.state_dict()))
    other.kappa = 1.0
    step(other, others, 0.0)
    same(others[0], -LR * entered(8.0) * MU)
    torch_sgd = torch.optim.SGD(torchs, LR, momentum=MU)
    torch_sgd.load_state_dict(opt.state_dict())
    step(torch_sgd, torchs, 0.0)
    same(torchs[0], -LR * entered(8.0) * MU)
    back = exact(backs)
    back.load_state_dict(torch_sgd.state_dict())
    back.kappa = 4.0
    step(back, backs, 0.0)
    same(backs[0], -4 * LR * entered(8.0) * MU**5)


def test_a_change_at_a_step_that_a_scaler_skips():
    params = zeros()
    opt, scaler = exact(params), GradScaler("cpu", init_scale=4.0)
    grads = (1.0, float("inf"), 0.0)
    for kappa, grad in zip((1.0, 8.0, 2.0), grads, strict=True):
        opt.kappa = kappa
        scaler.scale(torch.zeros(()))
        params[0].grad = torch.full_like(params[0], 4.0 * grad)
        scaler.step(opt)
        scaler.update()
    same(params[0], -LR * (1 + 2 * MU**2))


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_captured_graph_follows_a_tensor_kappa(nesterov, monkeypatch):
    params, others = zeros(), zeros()
    kappa = torch.ones((), dtype=torch.float64)
    opt = exact(params, nesterov=nesterov, kappa=kappa, capturable=True, backend="triton")
    twin = exact(others, nesterov=nesterov)
    graph = Graph(monkeypatch)
    for index, number in enumerate(PATH):
        kappa.fill_(number)
        twin.kappa = number
        grad = 1.0 + index
        step(twin, others, grad)
        if index == 0:
            params[0].grad = torch.zeros_like(params[0])
        params[0].grad.fill_(grad)
        if index == 2:
            graph.capture(opt)
        if index < 2:
            opt.step()
        else:
            graph.replay()
        torch.testing.assert_close(params[0], others[0], rtol=1e-12, atol=0)
