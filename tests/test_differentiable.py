"""differentiable=True: gradients flow through the steps as they do through torch's."""

from __future__ import annotations

import pytest
import torch

from fused_ema import FusedScaledAdam, FusedScaledAdamW, FusedScaledSGD

CASES = [
    (FusedScaledSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (FusedScaledAdam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    (FusedScaledAdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
]


def through_steps(cls, kwargs, steps: int = 3) -> torch.Tensor:
    """Derivative of the parameters after some steps with respect to what scaled the gradients."""
    start = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    param = start.clone()
    optimizer = cls([param], differentiable=True, **kwargs)
    for _ in range(steps):
        param.grad = start * start + param
        optimizer.step()
    (grad,) = torch.autograd.grad(param.sum(), start)
    return grad


@pytest.mark.parametrize(("ours", "theirs", "kwargs"), CASES)
def test_gradients_through_several_steps_equal_torchs(ours, theirs, kwargs):
    found = through_steps(ours, {**kwargs, "ema_decay": 0.9})
    torch.testing.assert_close(found, through_steps(theirs, kwargs))


def test_averages_stay_out_of_the_graph():
    teacher = torch.nn.Parameter(torch.ones(3))
    param = torch.ones(3, requires_grad=True).clone()
    optimizer = FusedScaledSGD([param], lr=0.1, differentiable=True, ema_decay=0.9, ema=[teacher])
    param.grad = torch.ones(3, requires_grad=True).clone()
    optimizer.step()
    assert param.requires_grad
    assert teacher.grad_fn is None
    torch.testing.assert_close(teacher.detach(), torch.full((3,), 0.99))
