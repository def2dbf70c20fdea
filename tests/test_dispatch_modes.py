"""A step that something looks on at is taken by operations of torch's."""

from __future__ import annotations

import pytest
import torch
from optimizers import each_setting
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_ema import FusedScaledAdamW, FusedScaledSGD


class Writes(TorchDispatchMode):
    """Counts the operations that write to a tensor."""

    def __init__(self, tensor):
        super().__init__()
        self.memory, self.count = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.count += any(t.untyped_storage().data_ptr() == self.memory for t in tensors)
        return func(*args, **(kwargs or {}))


def trained(cls, **options):
    param = nn.Parameter(torch.ones(3))
    opt = cls([param], lr=0.125, **options)
    param.grad = torch.ones(3)
    opt.step()
    return param, opt


def replayed(cls, **options):
    """The weights after a traced step, and after its graph has run once more."""
    param, opt = trained(cls, **options)

    def step(grad):
        param.grad = grad
        opt.step()
        return param.detach().clone()

    graph = make_fx(step)(torch.ones(3))
    traced = param.detach().clone()
    with torch.no_grad():
        returned = graph(torch.full((3,), 2.0))
    assert torch.equal(returned, param)
    return traced, param.detach(), opt, param


def test_a_traced_step_moves_the_weights_as_torchs_foreach_does():
    expected = replayed(torch.optim.SGD, foreach=True, momentum=0.5, weight_decay=0.5)
    found = replayed(FusedScaledSGD, ema_decay=0.5, momentum=0.5, weight_decay=0.5)
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(found[0], found[1])


def test_a_graph_repeats_the_scalars_of_the_step_that_was_traced():
    """As of torch's optimizers, unless they are capturable."""
    traced, weight, opt, param = replayed(FusedScaledAdamW, weight_decay=0.0)
    first, second = 0.9, 0.999
    value, m, v = 1.0, 0.0, 0.0
    for grad, count in ((1.0, 1), (1.0, 2), (2.0, 2)):
        m, v = first * m + (1 - first) * grad, second * v + (1 - second) * grad**2
        before, root = value, (v / (1 - second**count)) ** 0.5
        value -= 0.125 * m / (1 - first**count) / (root + 1e-8)
    torch.testing.assert_close(traced, torch.full((3,), before))
    torch.testing.assert_close(weight, torch.full((3,), value))
    assert opt.state[param]["step"].item() == 3.0


def test_a_traced_step_moves_the_average_at_each_replay():
    traced, weight, opt, param = replayed(FusedScaledSGD, ema_decay=0.5)
    # lr 0.125: 1, 0.875, 0.75, then the replay with a gradient of 2
    assert torch.equal(traced, torch.full((3,), 0.75))
    assert torch.equal(weight, torch.full((3,), 0.5))
    average = 1.0
    for value in (0.875, 0.75, 0.5):
        average += 0.5 * (value - average)
    assert torch.equal(opt.state[param]["ema"], torch.full((3,), average))
    assert opt.state[param]["step"].item() == 3.0


def test_plans_follow_modes_as_they_come_and_go():
    param, opt = trained(FusedScaledAdamW, ema_decay=0.5)
    assert opt.backends == ("native",)
    with Writes(param) as mode:
        opt.step()
    assert opt.backends == ("foreach",)
    assert mode.count > 0
    plans = opt._stepper.plans
    opt.step()
    assert opt.backends == ("native",)
    assert opt._stepper.plans is not plans


def test_plans_stay_while_a_mode_is_active():
    param, opt = trained(FusedScaledAdamW)
    with Writes(param):
        opt.step()
        plans = opt._stepper.plans
        opt.step()
    assert opt._stepper.plans is plans


def test_a_step_under_a_mode_goes_on_where_the_last_one_was():
    def run(watched):
        param, opt = trained(FusedScaledSGD, momentum=0.5, ema_decay=0.5, max_grad_norm=0.5)
        for watch in watched:
            with Writes(param) if watch else torch.device("cpu"):
                opt.step()
        return param.detach(), opt.state[param]["ema"]

    for a, b in zip(run([False] * 4), run([True, False, True, False]), strict=True):
        torch.testing.assert_close(a, b)


def test_modes_for_functions_change_nothing():
    _, opt = trained(FusedScaledSGD)
    plans = opt._stepper.plans
    with torch.device("cpu"):
        opt.step()
    assert opt._stepper.plans is plans


@pytest.mark.parametrize("engine", ["native", "triton"])
def test_kernels_asked_for_by_name_refuse(engine):
    param, opt = trained(FusedScaledSGD, backend=engine)
    before = param.detach().clone()
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="FlopCounterMode"):
        opt.step()
    assert torch.equal(param, before)
    opt.step()
    assert not torch.equal(param, before)


@each_setting
def test_fake_tensors_are_stepped_outside_their_mode(optimizer, options):
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
    opt = optimizer.ours([param], lr=0.1, ema_decay=0.5, **options)
    for _ in range(2):
        opt.step()
    assert isinstance(opt.state[param]["ema"], FakeTensor)


@each_setting
def test_fake_tensors_are_stepped(optimizer, options):
    with FakeTensorMode() as mode:
        param = nn.Parameter(torch.ones(3))
        opt = optimizer.ours([param], lr=0.1, ema_decay=0.5, **options)
        for _ in range(3):
            param.grad = torch.ones(3)
            opt.step()
        ema = opt.state[param]["ema"]
    assert isinstance(ema, FakeTensor)
    assert ema.fake_mode is mode
    assert opt.backends == ("foreach",)
