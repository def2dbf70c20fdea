"""scaled_hyperparameters(): what a step really uses, which torch's namesake confirms."""

from __future__ import annotations

import math

import pytest
import torch
from optimizers import OPTIMIZERS, SETTINGS, each_optimizer, each_setting_in_torch

import fused_ema
from fused_ema import CosineDecay, WarmUpDecay

KAPPA = 3.0


def parameter(dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator).to(dtype))


def trained(opt: torch.optim.Optimizer, steps: int = 6) -> torch.Tensor:
    (param,) = opt.param_groups[0]["params"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        param.grad = torch.randn(5, dtype=torch.float64, generator=generator)
        opt.step()
    return param.detach()


def check_as_torch(optimizer, options, ours_alone, **changes):
    ours = optimizer.ours([parameter()], **options, **ours_alone, kappa=KAPPA, **changes)
    (used,) = ours.scaled_hyperparameters()
    assert used.pop("ema_decay") is None
    theirs = optimizer.theirs([parameter()], **{**options, **used})
    torch.testing.assert_close(trained(ours), trained(theirs), rtol=1e-12, atol=1e-14)


@each_setting_in_torch
def test_torch_makes_the_same_steps_with_the_values(optimizer, options):
    check_as_torch(optimizer, options, {})


@pytest.mark.parametrize(
    ("name", "ours_alone"),
    [
        ("SGD-nesterov", {"momentum_scaling": "exact"}),
        ("SGD-momentum", {"momentum_scaling": "exact"}),
        ("RMSprop-centered-momentum", {"momentum_scaling": "exact"}),
        ("Adam-l2", {"beta_scaling": "linear"}),
        ("AdamW-decay", {"beta_scaling": "linear"}),
        ("AdamW-decay", {"weight_decay_scaling": "none"}),
    ],
)
def test_torch_makes_the_same_steps_by_the_other_rules(name, ours_alone):
    optimizer, options = SETTINGS[name]
    check_as_torch(optimizer, options, ours_alone)


@each_optimizer
def test_at_kappa_one_the_values_are_those_given(optimizer):
    for options in optimizer.settings.values():
        opt = optimizer.ours([parameter()], **options, ema_decay=0.999)
        (used,) = opt.scaled_hyperparameters()
        (group,) = opt.param_groups
        assert used == {name: group[name] for name in used}
        assert used.keys() == {*optimizer.ours.rule.numbers, "ema_decay"} - {"kappa"}


def adamw(**options):
    return OPTIMIZERS["AdamW"].ours([parameter()], **options)


@pytest.mark.parametrize(
    ("kappa_scales", "lr", "ema_decay"),
    [("all", 0.02, 0.9**4), ("ema", 0.01, 0.9**4), ("optimizer", 0.02, 0.9)],
)
def test_kappa_scales_what_it_is_told_to(kappa_scales, lr, ema_decay):
    opt = adamw(lr=0.01, ema_decay=0.9, kappa=4, kappa_scales=kappa_scales)
    (used,) = opt.scaled_hyperparameters()
    assert used["lr"] == pytest.approx(lr)
    assert used["ema_decay"] == pytest.approx(ema_decay)


def ema_decay_of_next_move(opt, start: float) -> float:
    """What the average kept of itself until it moved, on weights that are pinned at 0."""
    (param,) = opt.param_groups[0]["params"]
    before = float(opt.state[param]["ema"][0]) if opt.state[param] else start
    for _ in range(100):
        param.grad = torch.zeros_like(param)
        with torch.no_grad():
            param.zero_()
        opt.step()
        after = float(opt.state[param]["ema"][0])
        if after != before:
            return after / before
    raise AssertionError("the average never moved")


@pytest.mark.parametrize("kappa_scales", ["all", "optimizer"])
@pytest.mark.parametrize("ema_every", [1, 3])
@pytest.mark.parametrize("decay", [0.9, CosineDecay(0.5, 100.0), WarmUpDecay(0.99)])
def test_the_decay_is_that_of_the_averages_next_move(decay, ema_every, kappa_scales):
    param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = fused_ema.FusedScaledSGD(
        [param], ema_decay=decay, kappa=2, ema_every=ema_every, kappa_scales=kappa_scales
    )
    param.grad = torch.zeros_like(param)
    opt.step()  # begins the average at 1; with ema_every the next move is no full round away
    for _ in range(3):
        (used,) = opt.scaled_hyperparameters()
        assert ema_decay_of_next_move(opt, 1.0) == pytest.approx(used["ema_decay"], rel=1e-12)


def test_several_averages_are_a_tuple_and_groups_have_their_own():
    groups = [
        {"params": [parameter()], "ema_decay": (0.9, 0.99)},
        {"params": [parameter()], "lr": 0.5, "ema_decay": None},
    ]
    opt = fused_ema.FusedScaledSGD(groups, lr=0.1, kappa=2)
    first, second = opt.scaled_hyperparameters()
    assert first["ema_decay"] == pytest.approx((0.81, 0.9801))
    assert (first["lr"], second["lr"], second["ema_decay"]) == (0.2, 1.0, None)


def test_a_change_of_kappa_shows_at_once():
    opt = adamw(lr=0.01, ema_decay=0.9)
    opt.kappa = 9
    (used,) = opt.scaled_hyperparameters()
    assert used["lr"] == pytest.approx(0.03)


def test_any_optimizers_average_has_its_decay_alone():
    ema = fused_ema.FusedEMA(torch.optim.SGD([parameter()]), 0.9, kappa=2)
    assert ema.scaled_hyperparameters() == [{"ema_decay": pytest.approx(0.81)}]


def test_tensors_are_read():
    opt = adamw(lr=torch.tensor(0.01), betas=(torch.tensor(0.5), 0.9), fused=True, kappa=4)
    (used,) = opt.scaled_hyperparameters()
    assert type(used["lr"]) is float
    assert used["lr"] == pytest.approx(0.02)
    assert used["betas"] == pytest.approx((0.5**4, 0.9**4))


def test_a_learning_rate_of_zero_has_its_limit():
    values = [
        adamw(lr=lr, weight_decay=0.1, kappa=4).scaled_hyperparameters()[0]["weight_decay"]
        for lr in (0.0, 1e-9)
    ]
    assert values == pytest.approx([math.sqrt(4) * 0.1] * 2)


def test_a_bad_value_raises():
    opt = adamw(ema_decay=lambda t: 2.0)
    with pytest.raises(ValueError, match=r"ema_decay=2\.0 is out of range"):
        opt.scaled_hyperparameters()
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr=-1\.0 is out of range"):
        opt.scaled_hyperparameters()
