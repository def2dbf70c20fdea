"""Parameters that nothing can average: frozen integers, booleans, float8, quantized weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD

KINDS = {
    "uint8": torch.arange(6, dtype=torch.uint8),
    "int8": torch.arange(-3, 3, dtype=torch.int8),
    "int64": torch.arange(6),
    "bool": torch.arange(6) > 2,
    "float8": torch.arange(6.0).to(torch.float8_e4m3fn),
}


class Adapter(nn.Module):
    """A frozen base that lies in few bits, and what is trained beside it."""

    def __init__(self, base: torch.Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(base.clone(), requires_grad=False)
        self.adapter = nn.Parameter(torch.ones(6))


def average_of_ones(steps: int, lr: float = 0.5, decay: float = 0.75) -> float:
    """The average of plain descent with gradient 1 from weight 1."""
    weight = average = 1.0
    for _ in range(steps):
        weight -= lr
        average = decay * average + (1 - decay) * weight
    return average


def take_steps(model: Adapter, opt: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model.adapter.grad = torch.ones(6)
        opt.step()


@pytest.mark.parametrize("base", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["fused", "FusedEMA", "delta"])
def test_its_average_is_what_it_is(kind, base):
    model = Adapter(base)
    if kind == "FusedEMA":
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        access = FusedEMA(opt, (0.75, 0.9))
    else:
        form = {"ema_format": "delta"} if kind == "delta" else {}
        opt = access = FusedScaledSGD(model.parameters(), lr=0.5, ema_decay=(0.75, 0.9), **form)
    take_steps(model, opt)
    assert torch.equal(model.base.float(), base.float())
    average = access.ema_state_dict(model)
    assert torch.equal(average["base"].float(), base.float())
    assert average["base"].dtype == base.dtype
    expected = torch.full((6,), average_of_ones(3))
    torch.testing.assert_close(average["adapter"], expected, rtol=1e-3, atol=0)
    for index in (0, 1):
        with access.ema_weights(index):
            assert torch.equal(model.base.float(), base.float())
    other = Adapter(torch.zeros(6).to(base.dtype))
    access.copy_ema_to(other)
    assert torch.equal(other.base.float(), base.float())
    torch.testing.assert_close(other.adapter, expected, rtol=1e-3, atol=0)
    assert len(access.state_dict()["state"]) == 1  # as torch's, of what is stepped
    twin = Adapter(base)
    if kind != "FusedEMA":
        again = FusedScaledSGD(twin.parameters(), lr=0.5, ema_decay=(0.75, 0.9), **form)
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        take_steps(twin, again, 1)
        assert torch.equal(twin.base.float(), base.float())


def test_a_teachers_own_is_its_average():
    model, teacher = Adapter(torch.arange(6)), Adapter(torch.arange(6) * 2)
    opt = FusedScaledSGD(model.parameters(), lr=0.5, ema_decay=0.75, teacher=teacher)
    take_steps(model, opt)
    assert torch.equal(teacher.base, torch.arange(6) * 2)
    assert torch.equal(opt.ema_state_dict(model)["base"], teacher.base)
    with opt.ema_weights():
        assert torch.equal(model.base, torch.arange(6) * 2)
    assert torch.equal(model.base, torch.arange(6))
    assert torch.equal(teacher.base, torch.arange(6) * 2)


def test_a_teacher_may_share_it_but_not_differ_in_dtype():
    model, teacher = Adapter(torch.arange(6)), Adapter(torch.arange(6))
    teacher.base = model.base
    opt = FusedScaledSGD(model.parameters(), lr=0.5, ema_decay=0.75, teacher=teacher)
    take_steps(model, opt)
    with opt.ema_weights():
        assert torch.equal(model.base, torch.arange(6))
    other = Adapter(torch.arange(6, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"dtype torch\.uint8; allowed for a torch\.int64"):
        FusedScaledSGD(model.parameters(), ema_decay=0.75, teacher=other)


def test_one_that_requires_grad_is_refused_with_the_way_out():
    trained = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))
    rest = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=r"float8_e4m3fn; allowed: .* or requires_grad=False"):
        FusedScaledAdamW([rest, trained], ema_decay=0.9).step()
    with pytest.raises(TypeError, match=r"float8_e4m3fn; allowed: .* or requires_grad=False"):
        FusedEMA(torch.optim.SGD([rest, trained]), 0.9).step()
    assert torch.equal(rest, torch.ones(2))
