"""What kappa drives: the optimizer and the average, or one of them alone."""

from __future__ import annotations

import math

import pytest
import torch
import twins

from fused_ema import CosineDecay, FusedScaledAdamW, FusedScaledSGD

SHAPES = ((5, 3), (), (257,))
KAPPA, RHO = 4.0, 0.9
CASES = {
    "sgd": (FusedScaledSGD, {"lr": 0.1, "momentum": 0.9, "momentum_scaling": "exact"}),
    "adamw": (FusedScaledAdamW, {"lr": 0.1, "weight_decay": 0.1}),
}


def trained(case, kappa, kappa_scales, ema_decay=RHO, steps=5, backend="auto", **options):
    """An optimizer and its parameters after some steps."""
    cls, flags = CASES[case]
    params = twins.parameters(SHAPES, torch.float64)
    options = {"ema_decay": ema_decay, "kappa": kappa, "kappa_scales": kappa_scales, **options}
    opt = cls(params, backend=backend, **flags, **options)
    for step in range(steps):
        twins.set_gradients(step, params)
        opt.step()
    return opt, params


def assert_same(one, other, keys):
    (opt, params), (twin, others) = one, other
    for p, q in zip(params, others, strict=True):
        for key in keys:
            assert torch.equal(opt.state[p][key], twin.state[q][key]), key


@pytest.mark.parametrize("case", CASES)
def test_the_average_alone(case, backend):
    """The optimizer is the one at kappa 1, its average that of rho**kappa."""
    one = trained(case, KAPPA, "ema", backend=backend)
    twin = trained(case, 1.0, "all", math.pow(RHO, KAPPA), backend=backend)
    assert all(map(torch.equal, one[1], twin[1]))
    states = [k for k in one[0].state[one[1][0]] if k != "ema"]
    assert_same(one, twin, states)
    for p, q in zip(one[1], twin[1], strict=True):
        torch.testing.assert_close(one[0].state[p]["ema"], twin[0].state[q]["ema"])
    assert one[0].param_groups[0]["base_steps"] == 5 * KAPPA
    assert one[0].state[one[1][0]]["step"] == 5.0


@pytest.mark.parametrize("case", CASES)
def test_the_optimizer_alone(case, backend):
    """The optimizer is the one at kappa, its average moves by rho a step."""
    one = trained(case, KAPPA, "optimizer", backend=backend)
    twin = trained(case, KAPPA, "all", math.pow(RHO, 1 / KAPPA), backend=backend)
    assert all(map(torch.equal, one[1], twin[1]))
    assert_same(one, twin, [k for k in one[0].state[one[1][0]] if k != "ema"])
    for p, q in zip(one[1], twin[1], strict=True):
        torch.testing.assert_close(one[0].state[p]["ema"], twin[0].state[q]["ema"])
    assert one[0].param_groups[0]["base_steps"] == 5 * KAPPA


def test_a_schedule_is_read_where_the_samples_are():
    asked = []

    def schedule(t):
        asked.append(t)
        return RHO

    trained("sgd", KAPPA, "optimizer", schedule, steps=3)
    assert asked == [0.0, KAPPA, 2 * KAPPA]


def test_averages_that_move_at_every_third_step():
    """With rho alone, three steps are one of rho**3."""
    every = trained("sgd", KAPPA, "optimizer", steps=6, ema_every=3)
    (p, *_), q = every[1], trained("sgd", KAPPA, "optimizer", steps=6)[1][0]
    assert torch.equal(p, q)
    params = twins.parameters(SHAPES, torch.float64)
    average = params[0].detach().clone()
    opt = FusedScaledSGD(params, kappa=KAPPA, **CASES["sgd"][1])
    for step in range(6):
        twins.set_gradients(step, params)
        opt.step()
        if step % 3 == 2:
            average = average.lerp(params[0].detach(), 1 - RHO**3)
    torch.testing.assert_close(every[0].state[p]["ema"], average)


@pytest.mark.parametrize("kappa_scales", ["all", "ema", "optimizer"])
@pytest.mark.parametrize("ema_decay", [RHO, CosineDecay(RHO, 64)])
@pytest.mark.parametrize("case", CASES)
def test_a_device_folds_it_alike(case, kappa_scales, ema_decay, device_backend):
    options = {"backend": device_backend, "ema_decay": ema_decay}
    one = trained(case, KAPPA, kappa_scales, capturable=True, **options)
    twin = trained(case, KAPPA, kappa_scales, **options)
    for p, q in zip(one[1], twin[1], strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(one[0].state[p]["ema"], twin[0].state[q]["ema"])
        assert float(one[0].state[p]["step"]) == twin[0].state[q]["step"]


def test_it_is_a_field_of_each_group():
    params = twins.parameters(SHAPES, torch.float64)
    groups = [
        {"params": params[:1], "kappa_scales": "ema"},
        {"params": params[1:2], "kappa_scales": "optimizer"},
        {"params": params[2:]},
    ]
    opt = FusedScaledSGD(groups, lr=0.1, kappa=KAPPA, ema_decay=RHO)
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    opt.step()
    moved = [float((b - p.detach()).flatten()[0]) for b, p in zip(before, params, strict=True)]
    assert moved == pytest.approx([0.1, 0.1 * KAPPA, 0.1 * KAPPA])
    opt.param_groups[0]["kappa_scales"] = "all"
    before = params[0].detach().clone()
    opt.step()
    assert float((before - params[0].detach()).flatten()[0]) == pytest.approx(0.1 * KAPPA)


def test_it_is_checked_saved_and_warned_of():
    with pytest.raises(ValueError, match="kappa_scales='none' is not known; allowed: 'all', 'ema'"):
        trained("sgd", 2.0, "none")
    opt, params = trained("sgd", 2.0, "ema")
    twin = FusedScaledSGD(params, lr=0.1, momentum=0.9, ema_decay=RHO)
    twin.load_state_dict(opt.state_dict())
    assert twin.param_groups[0]["kappa_scales"] == "ema"
    other = FusedScaledSGD(params, lr=0.1, ema_decay=RHO, kappa_scales="optimizer")
    with pytest.warns(UserWarning, match="kappa_scales"):
        other.load_state_dict(opt.state_dict())
