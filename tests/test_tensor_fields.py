"""Hyper-parameters given as tensors: what is read, what is refused, what is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_ema import FusedScaledAdamW, FusedScaledSGD


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize("field", ["lr", "weight_decay", "kappa", "ema_decay"])
def test_a_tensor_that_requires_grad_is_refused(field):
    value = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=f"{field} requires grad"):
        FusedScaledSGD(weights(), **{field: value})


@pytest.mark.parametrize("field", ["lr", "kappa"])
def test_a_tensor_of_several_elements_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field} is a tensor of shape \(2,\)"):
        FusedScaledSGD(weights(), **{field: torch.ones(2)})


def test_every_tensor_is_checked_like_a_number():
    with pytest.raises(ValueError, match=r"ema_decay=1\.5 is out of range"):
        FusedScaledSGD(weights(), ema_decay=torch.tensor(1.5))
    with pytest.raises(ValueError, match=r"betas\[1\]=2\.0 is out of range"):
        FusedScaledAdamW(weights(), betas=(0.9, torch.tensor(2.0)))


def test_setting_kappa_writes_no_tensor_of_the_callers():
    """A captured graph reads a capturable group's tensor; nobody reads another one again."""
    kappa = torch.tensor(2.0)
    opt = FusedScaledSGD(weights(), kappa=kappa)
    opt.kappa = 3.0
    assert opt.kappa == 3.0
    assert float(kappa) == 2.0
    whole = FusedScaledSGD(weights(), kappa=torch.tensor(2), capturable=True, backend="triton")
    whole.kappa = 2.5
    assert whole.kappa == 2.5


def test_a_kappa_of_one_dimension_steps():
    (weight,) = weights()
    opt = FusedScaledSGD(
        [weight], lr=0.5, kappa=torch.tensor([2.0]), capturable=True, backend="triton"
    )
    weight.grad = torch.ones(2)
    opt.step()
    assert torch.equal(weight.detach(), torch.zeros(2))
    assert float(opt.param_groups[0]["base_steps"]) == 2.0


def test_a_saved_tensor_is_what_it_was():
    lr = torch.tensor(0.5)
    opt = FusedScaledSGD(weights(), lr=lr, kappa=torch.tensor(2.0))
    saved = opt.state_dict()
    lr.fill_(9.0)
    assert float(saved["param_groups"][0]["lr"]) == 0.5


def test_a_new_tensor_in_a_capturable_group_is_checked():
    """Also one on the CPU beside parameters on a device, which a meta tensor stands for."""
    p = nn.Parameter(torch.empty(2, device="meta"))
    opt = FusedScaledAdamW([p], lr=torch.tensor(0.1), ema_decay=0.9, kappa=2.0, capturable=True)
    folder = opt._stepper.folder
    folder.refresh(opt.param_groups, opt._check_group)
    opt.param_groups[0]["kappa"] = torch.tensor(3.0)
    folder.refresh(opt.param_groups, opt._check_group)
    assert folder.kappas == [3.0]
    assert isinstance(folder.kappas[0], float)
    opt.param_groups[0]["lr"] = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(ValueError, match="lr requires grad"):
        folder.refresh(opt.param_groups, opt._check_group)
