"""Averages that move at every m-th step, by the decay of all the steps that they let pass."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import twins
from torch import nn

from fused_ema import CosineDecay, FusedScaledAdamW, FusedScaledSGD, PowerDecay
from fused_ema.kernels import step as step_kernel

parameters = partial(twins.parameters, ((), (0,), (7,), (5, 3)), torch.float64)
KAPPAS = (1.0, 2.0, 0.5, 3.0, 1.0, 4.0, 1.5, 1.0, 2.0, 1.0, 1.0)


def expected_averages(trajectory, rho, every: int):
    """By hand: the average moves at every ``every``-th step, by rho to the kappas since."""
    ema, waited, seen, found = trajectory[0][1], 0.0, 0.0, []
    for step, (kappa, param) in enumerate(trajectory[1:], 1):
        waited, seen = waited + kappa, seen + kappa
        if step % every == 0:
            decay = rho(seen - waited, waited) ** waited
            ema, waited = decay * ema + (1.0 - decay) * param, 0.0
        found.append(ema)
    return found


cosine, profile = CosineDecay(0.5, total=20.0), PowerDecay(3.0)
DECAYS = {
    "constant": (0.9, lambda t, kappa: 0.9),
    "schedule": (cosine, lambda t, kappa: cosine(max(t + (kappa - 1) / 2, 0))),
    "power": (profile, profile.geometric_mean),
}


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("every", [2, 3])
def test_averages_follow_at_every_mth_step(every, name, backend):
    ema_decay, rho = DECAYS[name]
    params = parameters()
    opt = FusedScaledAdamW(params, lr=0.1, ema_decay=ema_decay, ema_every=every, backend=backend)
    trajectories = [[(0.0, p.detach().clone())] for p in params]
    averages = []
    for step, kappa in enumerate(KAPPAS):
        opt.kappa = kappa
        twins.set_gradients(step, params)
        opt.step()
        for trajectory, p in zip(trajectories, params, strict=True):
            trajectory.append((kappa, p.detach().clone()))
        averages.append([opt.state[p]["ema"].clone() for p in params])
    assert set(opt.backends) == {backend}
    expected = [expected_averages(trajectory, rho, every) for trajectory in trajectories]
    for found, wanted in zip(averages, zip(*expected, strict=True), strict=True):
        for ema, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(ema, value, rtol=1e-12, atol=1e-14)


def test_steps_between_do_not_touch_averages(monkeypatch):
    launcher, taken = step_kernel.launcher, []

    def recorded(**kind):
        launch = launcher(**kind)

        def run(**parts):
            taken.append(kind["slot"].size - kind["slot"].first_average)
            launch(**parts)

        return run

    monkeypatch.setattr(step_kernel, "launcher", recorded)
    params = parameters()
    opt = FusedScaledSGD(params, ema_decay=(0.9, 0.99), ema_every=2, backend="triton")
    for step in range(4):
        twins.set_gradients(step, params)
        opt.step()
    assert taken == [0, 2, 0, 2]


def test_a_resumed_run_is_bit_exact():
    params, others = parameters(), parameters()
    make = partial(FusedScaledAdamW, lr=0.1, ema_decay=cosine, ema_every=3, kappa=2.0)
    opt = make(params)
    for step in range(4):
        twins.set_gradients(step, params)
        opt.step()
    other = make(others)
    other.load_state_dict(deepcopy(opt.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    for step in range(4, 11):
        twins.set_gradients(step, params, others)
        opt.step()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(opt.state[p]["ema"], other.state[q]["ema"])


def test_buffers_move_with_the_averages():
    model = nn.BatchNorm1d(3)
    opt = FusedScaledSGD(
        model.parameters(), ema_decay=0.5, ema_every=2, model=model, ema_buffers="average"
    )
    for step in range(4):
        model(torch.randn(8, 3)).square().sum().backward()
        if step == 0:
            expected = model.running_mean.clone()
        opt.step()
        if step % 2 == 1:
            expected.lerp_(model.running_mean, 1 - 0.5**2)
        held = opt.ema_state_dict(model)["running_mean"]
        torch.testing.assert_close(held, expected, rtol=1e-6, atol=1e-7)


def test_a_frozen_parameter_that_gets_a_gradient_between_is_stepped():
    first, second = parameters()[2:]
    second.requires_grad_(False)
    opt = FusedScaledSGD([first, second], lr=1.0, ema_decay=0.5, ema_every=10)
    first.grad = torch.ones_like(first)
    opt.step()
    second.requires_grad_(True)
    second.grad = torch.ones_like(second)
    before = second.detach().clone()
    opt.step()
    assert torch.equal(second.detach(), before - 1.0)


@pytest.mark.parametrize("bad", [0, -1, 1.5, None])
def test_a_bad_ema_every_is_refused(bad):
    with pytest.raises(ValueError, match=r"ema_every=.*allowed: an int >= 1"):
        FusedScaledSGD(parameters(), ema_every=bad)


def test_a_graph_cannot_let_steps_pass():
    with pytest.raises(ValueError, match="ema_every=2 with capturable=True; allowed: 1"):
        FusedScaledSGD(parameters(), ema_every=2, capturable=True)
