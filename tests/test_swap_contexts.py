"""The ways in which ema_weights() is entered, left, nested and dropped."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack

import pytest
import torch
from swaps import Net, Whole, assert_holds_average, trained
from test_swap_interrupts import Interrupt
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD


class Wrapper:
    """Takes the optimizer's class and forwards what it lacks, as trainers' wrappers do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._wrapped = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name: str):
        return getattr(self._wrapped, name)


class Sharing:
    """Takes the optimizer's attributes over."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = dict(optimizer.__dict__)
        self.__class__ = type("Shared", (type(optimizer),), {})


@pytest.mark.parametrize("wrapper", [Wrapper, Sharing])
def test_a_wrapper_and_what_it_wraps_know_of_each_others_swap(wrapper):
    model, opt = trained()
    wrapped = wrapper(opt)
    whole = Whole(model, opt)
    for one, other in ((opt, wrapped), (wrapped, opt)):
        with one.ema_weights():
            assert_holds_average(model, opt)
            for misuse in (other.state_dict, other.step, other.ema_weights().__enter__):
                with pytest.raises(RuntimeError, match=r"inside ema_weights\(\)"):
                    misuse()
        whole.check()
        other.state_dict()


def test_two_averages_of_one_tensor_do_not_nest():
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (FusedEMA(inner, decay, model=model) for decay in (0.5, 0.9))
    model(torch.ones(1, 2)).sum().backward()
    inner.step()
    whole = Whole(model, first)
    with first.ema_weights():
        with pytest.raises(RuntimeError, match="another optimizer's average"), second.ema_weights():
            pass
        assert_holds_average(model, first)
    whole.check()
    with second.ema_weights():
        assert_holds_average(model, second)
    whole.check()


def test_a_context_is_entered_once():
    model, opt = trained()
    whole = Whole(model, opt)
    context = opt.ema_weights()
    with pytest.raises(RuntimeError, match="not open"):
        context.__exit__(None, None, None)
    with context, pytest.raises(RuntimeError, match="entered before"):
        context.__enter__()
    with pytest.raises(RuntimeError, match="entered before"):
        context.__enter__()
    with pytest.raises(RuntimeError, match="not open"):
        context.__exit__(None, None, None)
    whole.check()


def test_a_decorator_enters_at_each_call():
    model, opt = trained()
    whole = Whole(model, opt)

    @opt.ema_weights()
    def evaluate():
        assert_holds_average(model, opt)
        return model.last.weight.clone()

    assert torch.equal(evaluate(), evaluate())
    whole.check()


def test_an_exit_stack_and_an_abandoned_context():
    model, opt = trained()
    whole = Whole(model, opt)
    with ExitStack() as stack:
        stack.enter_context(opt.ema_weights())
        assert_holds_average(model, opt)
    whole.check()
    context = opt.ema_weights()
    context.__enter__()
    assert_holds_average(model, opt)
    del context
    whole.check()
    opt.step()

    def generate():
        with opt.ema_weights():
            yield

    whole = Whole(model, opt)
    running = generate()
    next(running)
    del running
    whole.check()


def test_a_context_in_a_cycle_is_collected():
    model, opt = trained()
    whole = Whole(model, opt)
    holder = nn.Module()
    holder.context = opt.ema_weights()
    holder.context.__enter__()
    holder.cycle = [holder]
    alive = weakref.ref(holder)
    del holder
    gc.collect()
    assert alive() is None
    whole.check()
    opt.state_dict()
    holder = nn.Module()
    opt.holder = holder  # the cycle runs through what the context holds
    holder.context = opt.ema_weights()
    alive = weakref.ref(holder)
    del holder, opt, whole
    gc.collect()
    assert alive() is None


def test_what_cannot_be_resharded_is_told_when_all_is_back(monkeypatch):
    model, opt = trained()
    whole = Whole(model, opt)
    calls = []

    def reshard(modules):
        calls.append(modules)
        if len(calls) > 1:
            raise Interrupt

    monkeypatch.setattr("fused_ema.ema.access.reshard", reshard)
    with pytest.raises(Interrupt), opt.ema_weights():
        pass
    assert len(calls) == 3  # on entry, on exit, and once more
    whole.check()
    opt.state_dict()


def test_dispatch_modes_and_inference_mode_see_nothing():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    model, opt = trained()
    whole = Whole(model, opt)
    context = opt.ema_weights()
    with torch.inference_mode(), context:
        assert_holds_average(model, opt)
        model.half()
    whole.check()
    with Counting() as mode:
        context = opt.ema_weights()
        context.__enter__()
        before = mode.calls
        context.__exit__(None, None, None)
        assert mode.calls == before
    whole.check()


def test_reading_before_the_first_step_begins_nothing():
    for kwargs in ({}, {"ema_format": "delta"}, {"ema_decay": (0.5, 0.9)}):
        model = Net().bfloat16()
        opt = FusedScaledAdamW(
            model.parameters(), **{"ema_decay": 0.5, **kwargs}, model=model, master_weights=True
        )
        whole = Whole(model, opt)
        with opt.ema_weights():
            assert torch.equal(model.last.bias, whole.before["model last.bias"][4])
        assert torch.equal(opt.ema_state_dict(model)["last.bias"], model.last.bias)
        other = Net()
        opt.copy_ema_to(other)
        assert torch.equal(other.last.bias, model.last.bias.float())
        opt.copy_ema_to(model)
        saved = opt.state_dict()["state"]
        assert not saved
        assert len(opt.state) == 0
        whole.check(versions=False)


@pytest.mark.parametrize("form", ["full", "bf16"])
def test_reading_a_teacher_before_the_first_step_sees_the_teacher(form):
    model, teacher = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    teacher.to(torch.bfloat16 if form == "bf16" else torch.float32)
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.5, teacher=teacher, ema_format=form)
    with opt.ema_weights():
        assert torch.equal(model.weight, teacher.weight.float())
        model.half()
    assert torch.equal(opt.ema_state_dict(model)["weight"], teacher.weight.float())
    assert len(opt.state) == 0
