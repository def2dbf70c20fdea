"""Optimizers inside wrappers: those that take the optimizer's class, and those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from fused_ema import (
    FusedEMA,
    FusedScaledAdamW,
    FusedScaledSGD,
    GradScaler,
    ProgressiveScaling,
    ema_state_dict,
    load_ema,
)
from fused_ema.wrapped import unwrapped


class Imitating:
    """Takes the optimizer's class and forwards what it lacks, as Lightning and Fabric do."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._inner = optimizer
        self.__class__ = type("Imitating", (Imitating, type(optimizer)), {})

    @property
    def optimizer(self) -> Optimizer:
        return self._inner

    def step(self, closure=None):
        return self._inner.step(closure)

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


class Holding(Optimizer):
    """An optimizer in name, as accelerate's, whose constructor is not called."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


WRAPPERS = [Imitating, Holding, lambda optimizer: Holding(Imitating(optimizer))]
around = pytest.mark.parametrize("wrap", WRAPPERS)


def trained(kind=FusedScaledAdamW, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = kind(model.parameters(), lr=0.1, ema_decay=0.5, **options)
    step(model, opt)
    return model, opt


def step(model, opt) -> None:
    opt.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    opt.step()


@around
def test_the_functions_take_wrappers(wrap):
    model, opt = trained()
    wrapper = wrap(opt)
    assert unwrapped(wrapper) is opt
    assert unwrapped(opt) is opt
    ProgressiveScaling(wrapper, 4, {0: 8})
    assert opt.kappa == 2.0
    expected = opt.ema_state_dict(model)
    assert ema_state_dict(model, [wrapper])["weight"].data_ptr() == expected["weight"].data_ptr()
    load_ema(wrapper, model, {name: torch.ones_like(v) for name, v in expected.items()})
    assert torch.equal(opt.state[model.weight]["ema"], torch.ones(2, 3))


@around
def test_a_fused_ema_follows_the_optimizer_inside(wrap):
    model = nn.Linear(3, 2)
    wrapper = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    ema = FusedEMA(wrapper, ema_decay=0.5)
    start = model.weight.detach().clone()
    step(model, unwrapped(wrapper))
    torch.testing.assert_close(ema.state[model.weight]["ema"], (start + model.weight.detach()) / 2)
    with pytest.raises(ValueError, match="a FusedScaledSGD has averages of its own"):
        FusedEMA(wrap(trained(FusedScaledSGD)[1]), ema_decay=0.5)


def test_methods_and_properties_act_on_the_optimizer_inside():
    model, opt = trained(max_grad_norm=1.0)
    wrapper = Imitating(opt)
    wrapper.kappa = 4.0
    wrapper.max_grad_norm = 2.0
    assert (opt.kappa, opt.max_grad_norm, wrapper.grad_norm) == (4.0, 2.0, opt.grad_norm)
    with wrapper.ema_weights():
        assert torch.equal(model.weight, opt.state[model.weight]["ema"])
        with pytest.raises(RuntimeError, match="inside ema_weights"):
            opt.step()
    wrapper.reset_moments()
    assert not opt.state[model.weight]["exp_avg"].any()
    wrapper.load_state_dict(wrapper.state_dict())
    wrapper.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(opt.param_groups) == 2
    assert vars(wrapper).keys() == {"_inner"}
    assert isinstance(wrapper, FusedScaledAdamW)
    with pytest.raises(AttributeError):
        wrapper.grad_scale  # noqa: B018


def test_a_users_subclass_is_no_wrapper():
    class Own(FusedScaledSGD):
        def twice(self) -> float:
            return 2 * self.param_groups[0]["lr"]

    _, opt = trained(Own)
    assert opt.twice() == Imitating(opt).twice() == 0.2


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, GradScaler])
@pytest.mark.parametrize("fused", [True, None])
def test_scalers_reach_the_optimizer_inside(scaler, fused):
    models, opts = zip(*(trained(FusedScaledSGD, fused=fused) for _ in range(2)), strict=True)
    scaler = scaler("cpu", init_scale=1024.0)
    wrapper = Imitating(opts[0])
    for factor in (1.0, torch.inf, 1.0):
        wrapper.zero_grad()
        scaler.scale(factor * models[0](torch.ones(1, 3)).sum()).backward()
        scaler.step(wrapper)
        scaler.update()
        if factor == 1.0:
            step(models[1], opts[1])
        read = wrapper.state_dict()["param_groups"]
        assert read == opts[1].state_dict()["param_groups"]
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
    assert vars(wrapper).keys() == {"_inner"}
