"""Bad values are refused by name, with the value and what is allowed; nothing moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fused_ema import CosineDecay, FusedScaledAdam, FusedScaledAdamW, FusedScaledSGD, scaling


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (FusedScaledSGD, {"lr": -1.0}, r"lr=-1\.0 is out of range; allowed: 0\.0 <= lr"),
        (FusedScaledSGD, {"lr": math.nan}, "lr=nan is out of range"),
        (FusedScaledSGD, {"momentum": -0.1}, r"momentum=-0\.1 is out of range"),
        (FusedScaledSGD, {"weight_decay": -1}, "weight_decay=-1 is out of range"),
        (FusedScaledSGD, {"nesterov": True}, "nesterov=True requires momentum > 0"),
        (
            FusedScaledSGD,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            r"dampening = 0; received momentum=0\.9, dampening=0\.1",
        ),
        (FusedScaledSGD, {"momentum_scaling": "half"}, "momentum_scaling='half' is not known"),
        (FusedScaledAdam, {"eps": -1e-8}, "eps=-1e-08 is out of range"),
        (FusedScaledAdam, {"betas": (1.0, 0.9)}, r"betas\[0\]=1\.0 is out of range; allowed: 0 <="),
        (FusedScaledAdam, {"betas": (0.9, -0.1)}, r"betas\[1\]=-0\.1 is out of range"),
        (FusedScaledAdam, {"betas": (0.9,)}, r"betas=\(0\.9,\) is not known; allowed: two numbers"),
        (FusedScaledAdam, {"betas": 0.9}, r"betas=0\.9 is not known; allowed: two numbers"),
        (FusedScaledSGD, {"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\); allowed: one"),
        (FusedScaledSGD, {"lr": torch.ones((), requires_grad=True)}, "lr requires grad"),
        (FusedScaledSGD, {"kappa": "8"}, "kappa='8' is not a number"),
        (FusedScaledSGD, {"ema_decay": "0.9"}, r"ema_decay='0\.9' is not a number"),
        (
            FusedScaledSGD,
            {"ema_decay": 0.9, "teacher": 5},
            "teacher: received a int; allowed: a module",
        ),
        (FusedScaledAdamW, {"ema_decay": 1.5}, r"ema_decay=1\.5 is out of range"),
        (FusedScaledAdamW, {"ema_decay": (0.9, -0.1)}, r"ema_decay=-0\.1 is out of range"),
        (FusedScaledAdamW, {"ema_order": "during"}, "ema_order='during' is not known; allowed: "),
        (FusedScaledAdamW, {"kappa": 0.0}, r"kappa=0\.0 is out of range; allowed: 0 < kappa < inf"),
        (FusedScaledAdamW, {"kappa": math.inf}, "kappa=inf is out of range"),
        (FusedScaledAdamW, {"beta_scaling": "cubic"}, "beta_scaling='cubic' is not known"),
        (
            FusedScaledAdamW,
            {"weight_decay_scaling": "?"},
            r"weight_decay_scaling='\?' is not known",
        ),
        (FusedScaledAdamW, {"backend": "cuda"}, "backend='cuda' is not known; allowed: 'auto', "),
        (
            FusedScaledAdamW,
            {"kappa": 16.0, "beta_scaling": "linear"},
            r"gives beta = 1 - kappa\*\(1 - 0\.9\) = -0\.6, outside .* use kappa <= 10 or",
        ),
        (
            FusedScaledAdamW,
            {"kappa": 2.0, "lr": 1.0, "weight_decay": 1.0},
            "removes the whole weight at every base step",
        ),
    ],
)
def test_bad_arguments(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(weights(), **kwargs)
    if "backend" not in kwargs and "ema" not in kwargs:
        with pytest.raises(ValueError, match=message):
            cls([{"params": weights(), **kwargs}])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True, "fused": True}, "`fused` does not support `differentiable`"),
    ],
)
def test_flags_that_exclude_each_other(flags, message):
    with pytest.raises(RuntimeError, match=message):
        FusedScaledAdamW(weights(), **flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "native"),
        ({"fused": True}, "native"),
        ({"foreach": True}, "foreach"),
        ({"fused": False}, "foreach"),
        ({"foreach": False}, "native"),
        ({"foreach": False, "fused": False}, "reference"),
        ({"differentiable": True}, "reference"),
        ({"backend": "foreach"}, "foreach"),
    ],
)
def test_torchs_flags_choose_the_backend(flags, expected):
    params = weights()
    optimizer = FusedScaledAdamW(params, **flags)
    if not flags.get("differentiable"):
        optimizer.step()
        assert optimizer.backends == (expected,)
    else:
        leaf = params[0]
        cloned = leaf.clone()
        optimizer = FusedScaledAdamW([cloned], **flags)
        cloned.grad = torch.ones(2, requires_grad=True)
        optimizer.step()
        assert optimizer.backends == (expected,)
        assert cloned.requires_grad


@pytest.mark.parametrize("name", ["native", "foreach"])
def test_an_explicit_backend_that_cannot_says_why(name):
    cloned = weights()[0].clone()
    optimizer = FusedScaledAdamW([cloned], differentiable=True, backend=name)
    cloned.grad = torch.ones(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot step .*differentiable"):
            optimizer.step()


def test_kappa_is_set_for_all_groups_or_none():
    first, second = weights(), weights()
    groups = [{"params": first}, {"params": second, "beta_scaling": "linear"}]
    optimizer = FusedScaledAdamW(groups)
    optimizer.kappa = 4
    assert optimizer.kappa == 4.0
    with pytest.raises(ValueError, match="beta_scaling='linear'"):
        optimizer.kappa = 100.0
    assert [group["kappa"] for group in optimizer.param_groups] == [4.0, 4.0]
    optimizer.add_param_group({"params": weights()})
    assert optimizer.param_groups.pop()["kappa"] == 4.0
    optimizer.param_groups[0]["kappa"] = 2.0
    with pytest.raises(ValueError, match=r"kappa differs between param groups: \[2\.0, 4\.0\]"):
        _ = optimizer.kappa


def test_a_parameter_given_twice_is_refused():
    (weight,) = weights()
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="appears twice"),
    ):
        FusedScaledSGD([weight, weight], lr=0.1)


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"ema_decay": lambda t: 1.5}, {"ema_order": "befor"}]
)
def test_a_bad_group_leaves_every_group_untouched(bad, backend):
    first, second = weights(), [nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = FusedScaledAdamW(
        [{"params": first}, {"params": second}], ema_decay=0.9, backend=backend
    )
    for p in (*first, *second):
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["amsgrad"] = True
    kept = {key: optimizer.param_groups[1][key] for key in bad}
    optimizer.param_groups[1].update(bad)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"out of range|not known"):
            optimizer.step()
    assert all(bool((p == 1.0).all()) for p in (*first, *second))
    assert optimizer.param_groups[0]["base_steps"] == 0.0
    optimizer.param_groups[1].update(kept)
    optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[first[0]]
    assert optimizer.state[first[0]]["max_exp_avg_sq"].max() > 0.0


def test_a_group_that_is_no_dict_is_torchs_error():
    optimizer = FusedScaledSGD(weights(), lr=0.1)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([1])


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="ema_decy"):
        FusedScaledSGD(weights(), ema_decy=0.9)


def test_cosine_decay_checks_its_arguments():
    with pytest.raises(ValueError, match=r"start=1\.1 is out of range"):
        CosineDecay(1.1, 10.0)
    with pytest.raises(ValueError, match="total=0 is out of range; allowed: total > 0"):
        CosineDecay(0.9, 0)
    schedule = CosineDecay(0.9, 10.0)
    assert schedule(0.0) == pytest.approx(0.9)
    assert schedule(5.0) == pytest.approx(0.95)
    assert schedule(10.0) == schedule(20.0) == 1.0


def test_weights_keep_their_precision_where_the_power_cancels():
    rho, kappa = 1.0 - 1e-12, 3.0
    assert scaling.ema_rate(rho, kappa) == pytest.approx(3e-12, rel=1e-4)
    assert scaling.ema_rate(1.0, 5.0) == 0.0
    assert scaling.ema_rate(0.0, 5.0) == 1.0


def test_numbers_of_numpy_are_numbers():
    """They are checked and computed with as floats are."""
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="beta_scaling='linear'"):
        FusedScaledAdamW([weight], kappa=np.float64(2000.0), beta_scaling="linear")
    with pytest.raises(ValueError, match="removes the whole weight"):
        FusedScaledAdamW([weight], kappa=np.float64(2.0), lr=1e-2, weight_decay=np.float64(200.0))
    opt = FusedScaledAdamW([weight], kappa=np.int64(4), ema_decay=np.float32(0.5))
    weight.grad = torch.ones(2)
    opt.step()
    assert opt.state[weight]["step"] == 4.0
