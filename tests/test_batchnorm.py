"""BatchNorm's running statistics move at kappa as they do in kappa base steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fused_ema import scale_batchnorm_momentum, scaling


def norms(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.02)
    )


@pytest.mark.parametrize("kappa", [0.5, 1, 3, 8])
def test_a_scaled_pass_does_what_kappa_base_passes_do(kappa):
    """The same batch again and again, so that both forms are exact: s + rate*(batch - s)."""
    batch = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = nn.BatchNorm1d(3, momentum=0.1, dtype=torch.float64)
    base = copy.deepcopy(scaled)
    scale_batchnorm_momentum(scaled, kappa)
    steps = 4
    for _ in range(steps):
        scaled(batch)
    for _ in range(round(steps * kappa)):
        base(batch)
    torch.testing.assert_close(scaled.running_mean, base.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.running_var, base.running_var, rtol=1e-12, atol=0)


def test_every_layer_scales_from_its_own_base_value():
    model = norms()
    for kappa in (8, 2, 4, 4):  # a call replaces the one before
        scale_batchnorm_momentum(model, kappa)
        assert model[0].momentum == pytest.approx(1 - 0.9**kappa, rel=1e-12)
        assert model[2].momentum == pytest.approx(1 - 0.98**kappa, rel=1e-12)
    scale_batchnorm_momentum(model, 1)
    assert (model[0].momentum, model[2].momentum) == (0.1, 0.02)


def test_a_copy_remembers_its_base_value_and_a_value_set_by_hand_is_one():
    model = norms()
    scale_batchnorm_momentum(model, 8)
    copied = copy.deepcopy(model)
    scale_batchnorm_momentum(copied, 2)
    assert copied[0].momentum == pytest.approx(1 - 0.9**2, rel=1e-12)
    copied[0].momentum = 0.3
    scale_batchnorm_momentum(copied, 2)
    assert copied[0].momentum == pytest.approx(1 - 0.7**2, rel=1e-12)


def test_cumulative_averages_stay_and_bad_kappas_are_told():
    model = norms(momentum=None)
    scale_batchnorm_momentum(model, 4)
    assert model[0].momentum is None
    with pytest.raises(ValueError, match="kappa=0 is out of range"):
        scale_batchnorm_momentum(model, 0)
    assert model[2].momentum == pytest.approx(1 - 0.98**4, rel=1e-12)


def test_ema_decay_is_what_the_rate_leaves():
    for rho in (0.0, 0.9, 0.9999, 1.0):
        for kappa in (0.25, 1.0, 7.5):
            decay = scaling.ema_decay(rho, kappa)
            assert decay == pytest.approx(1 - scaling.ema_rate(rho, kappa), abs=1e-15)
            assert math.isclose(decay, rho**kappa)
    with pytest.raises(ValueError, match=r"rho=1.5 is out of range"):
        scaling.ema_decay(1.5)
