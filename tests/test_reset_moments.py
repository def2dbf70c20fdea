"""reset_moments(): the rule starts anew, everything else goes on."""

from __future__ import annotations

import pytest
import torch
from optimizers import each_in_torch
from torch import nn

import fused_ema.step.stepper
from fused_ema import FusedEMA, FusedScaledAdamW


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2), (5,), ())
    return [nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in shapes]


def give(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        draw = torch.randn(param.shape, generator=generator)
        param.grad = draw.to(param.device, param.dtype)


@pytest.mark.parametrize("which", ["all", "some"])
@each_in_torch
def test_as_a_new_optimizer_whose_average_goes_on(optimizer, which, backend):
    fields, base = {"lr": 0.1, **optimizer.options}, optimizer.theirs
    params, twins = parameters(), parameters()
    opt = optimizer.ours(params, ema_decay=0.75, backend=backend, **fields)
    optimizers = [base([twin], **fields) for twin in twins]
    right = [twin.detach().clone() for twin in twins]
    for step in range(6):
        give(params, step)
        give(twins, step)
        if step == 3:
            held = [opt.state[p]["ema"] for p in params]
            opt.reset_moments(None if which == "all" else [params[1]])
            new = range(3) if which == "all" else [1]
            for i in new:
                optimizers[i] = base([twins[i]], **fields)
            assert all(opt.state[p]["ema"] is ema for p, ema in zip(params, held, strict=True))
            assert opt.param_groups[0]["base_steps"] == 3.0
        opt.step()
        for one in optimizers:
            one.step()
        right = [0.75 * r + 0.25 * twin.detach() for r, twin in zip(right, twins, strict=True)]
    for param, twin, average in zip(params, twins, right, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(opt.state[param]["ema"], average, rtol=1e-12, atol=1e-12)


def test_plans_stay_and_nothing_else_changes(monkeypatch, backend):
    params = [nn.Parameter(p.detach().bfloat16()) for p in parameters()]
    options = {"ema_decay": 0.75, "master_weights": True, "kappa": 2.0, "max_grad_norm": 1.0}
    opt = FusedScaledAdamW(params, backend=backend, **options)
    for step in range(2):
        give(params, step)
        opt.step()
    kept = [
        (opt.state[p][key], opt.state[p][key].clone()) for p in params for key in ("master", "ema")
    ]
    monkeypatch.setattr(fused_ema.step.stepper, "make_buckets", None)  # whoever plans again fails
    opt.reset_moments(iter(params))
    for value, before in kept:
        assert torch.equal(value, before)
    for param in params:
        assert all(not opt.state[param][key].any() for key in ("exp_avg", "exp_avg_sq", "step"))
    assert opt.param_groups[0]["base_steps"] == 4.0
    opt.step()
    assert opt.state[params[0]]["step"] == 2.0


def test_counters_on_the_device_are_zeroed_where_they_are():
    params = parameters()
    opt = FusedScaledAdamW(params, capturable=True, ema_decay=0.75, backend="triton")
    twin = FusedScaledAdamW(parameters(), ema_decay=0.75, backend="reference")
    for step in range(2):
        give(params, step)
        opt.step()
    counters = [opt.state[p]["step"] for p in params]
    opt.reset_moments()
    assert all(opt.state[p]["step"] is c for p, c in zip(params, counters, strict=True))
    assert not any(counters)
    with torch.no_grad():
        for param, other in zip(params, twin.param_groups[0]["params"], strict=True):
            other.copy_(param)
    give(params, 5)
    give(twin.param_groups[0]["params"], 5)
    opt.step()
    twin.step()
    for param, other in zip(params, twin.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-12)


def test_a_step_that_a_scaler_skipped_is_taken_back_first():
    params = [nn.Parameter(torch.ones(2))]
    # whose kernels skip
    opt = FusedScaledAdamW(params, ema_decay=0.75, backend="triton", fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    params[0].grad = torch.full((2,), torch.inf)
    scaler.step(opt)
    opt.reset_moments()
    assert params[0] not in opt.state
    assert opt.param_groups[0]["base_steps"] == 0.0


def test_what_it_refuses():
    params, others = parameters(), parameters()
    opt = FusedScaledAdamW(params, ema_decay=0.75)
    opt.reset_moments()  # before the first step there is nothing
    give(params, 0)
    opt.step()
    before = opt.state[params[0]]["exp_avg"].clone()
    with pytest.raises(ValueError, match="entry 1 is not a parameter of this optimizer"):
        opt.reset_moments([params[0], others[1]])
    with opt.ema_weights(), pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
        opt.reset_moments()
    assert torch.equal(opt.state[params[0]]["exp_avg"], before)
    opt.reset_moments(params[0])
    assert not opt.state[params[0]]["exp_avg"].any()
    assert opt.state[params[1]]["exp_avg"].any()
    with pytest.raises(RuntimeError, match="the optimizer that it follows"):
        FusedEMA(torch.optim.SGD(others), 0.9).reset_moments()
