"""Optimizers and groups without parameters, as ZeRO makes them where processes are many."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fused_ema
from fused_ema import FusedScaledAdamW, FusedScaledSGD


def empty(**options) -> FusedScaledAdamW:
    return FusedScaledAdamW([{"params": []}], ema_decay=0.9, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"max_grad_norm": math.inf, "ema_every": 3},
        {"capturable": True, "max_grad_norm": 1.0, "kappa": 2.0},
        {"capturable": True, "kappa": torch.tensor(2.0)},
        {"ema_decay": lambda t: 0.9},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_an_empty_optimizer_steps(options, backend):
    opt = FusedScaledAdamW([{"params": []}], **{"ema_decay": 0.9, "backend": backend, **options})
    assert opt.check_gradients() == 0.0
    for _ in range(4):
        opt.step()
    kappa = float(options.get("kappa", 1.0))
    assert opt.param_groups[0]["base_steps"] == 4 * kappa
    assert opt.grad_norm == (0.0 if "max_grad_norm" in options else None)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.reset_moments()
    opt.step()
    assert opt.param_groups[0]["base_steps"] == 5 * kappa


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("inf", [False, True])
@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, fused_ema.GradScaler])
def test_a_scaled_step(scaler, inf, capturable):
    """Beside an optimizer with gradients, whose check tells both."""
    param = nn.Parameter(torch.ones(2))
    full = FusedScaledSGD([param], lr=1.0, ema_decay=0.0, fused=True)
    opt = empty(max_grad_norm=1.0, capturable=capturable, fused=True)
    scaler = scaler("cpu", init_scale=4.0)
    for _ in range(2):
        scaler.scale(torch.zeros(()))
        param.grad = torch.full((2,), torch.inf if inf else 4.0)
        scaler.step(full)
        scaler.step(opt)
        scaler.update()
    assert opt.grad_norm == 0.0
    assert torch.equal(param, torch.full((2,), 1.0 if inf else -1.0))


def test_torchs_scaler_that_has_seen_no_gradient():
    param = nn.Parameter(torch.ones(2))
    opt = FusedScaledSGD([param], lr=1.0, ema_decay=0.0, max_grad_norm=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(opt)
    assert torch.equal(param, torch.ones(2))
    assert opt.param_groups[0]["base_steps"] == 1.0


def test_a_step_that_nothing_takes_is_not_counted_where_it_is_skipped():
    for opt in (empty(), empty(max_grad_norm=1.0)):
        opt.found_inf = torch.ones(())
        opt.step()
        del opt.found_inf
        opt.step()
        assert opt.state_dict()["param_groups"][0]["base_steps"] == 1.0


def test_reading_an_average_of_nothing():
    model = nn.Linear(2, 2)
    opt = empty()
    with opt.ema_weights():
        pass
    assert torch.equal(opt.ema_state_dict(model)["weight"], model.weight)
    before = copy.deepcopy(model)
    opt.copy_ema_to(model)
    assert torch.equal(model.weight, before.weight)
    with pytest.raises(IndexError, match="index=1"):
        opt.ema_state_dict(model, 1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("capturable", [True, False])
def test_an_empty_group_beside_another(first, capturable):
    param = nn.Parameter(torch.full((2,), 2.0))
    groups = [{"params": []}, {"params": [param]}]
    backend = "triton" if capturable else "auto"
    options = {"lr": 1.0, "ema_decay": 0.5, "max_grad_norm": math.inf, "capturable": capturable}
    opt = FusedScaledSGD(groups if first else groups[::-1], backend=backend, **options)
    for _ in range(2):
        param.grad = torch.ones(2)
        opt.found_inf, opt.grad_scale = torch.zeros(()), torch.ones(())
        opt.step()
    assert torch.equal(param, torch.zeros(2))
    assert torch.equal(opt.state[param]["ema"], torch.full((2,), 0.75))
    assert [float(group["base_steps"]) for group in opt.param_groups] == [2.0, 2.0]
    torch.testing.assert_close(float(opt.grad_norm), math.sqrt(2.0), rtol=1e-12, atol=0.0)
