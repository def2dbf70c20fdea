"""Devices without float64, such as Apple's GPUs: no tensor of that dtype is made on them.

The CPU stands for such a device: its widest dtype is declared to be float32, and whatever function
of torch's then returns a float64 tensor fails, as it would there.
"""

from __future__ import annotations

import math

import pytest
import torch
from optimizers import each_setting
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fused_ema
from fused_ema import FusedScaledAdamW, FusedScaledSGD, dtypes
from fused_ema.posthoc import reconstruct
from fused_ema.step.gradients import Control, Ending, Treatment

META = torch.device("meta")


class NoFloat64(TorchFunctionMode):
    """Refuses what such a device refuses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{func} makes a float64 tensor, which this device does not have")
        return result


@pytest.fixture
def narrow(monkeypatch):
    """Takes float64 away from the CPU while it is entered."""

    def enter() -> NoFloat64:
        monkeypatch.setitem(dtypes.NARROW, "cpu", torch.float32)
        return NoFloat64()

    return enter


def params() -> list[nn.Parameter]:
    found = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)]
    for param in found:
        param.grad = torch.linspace(1, 2, param.numel())
    return found


def run(opt, steps: int = 3) -> list[torch.Tensor]:
    for _ in range(steps):
        opt.step()
    stepped = [p for group in opt.param_groups for p in group["params"]]
    return [p.detach().clone() for p in stepped] + [opt.state[p]["ema"].clone() for p in stepped]


def test_the_stand_in_refuses_float64(narrow):
    with narrow(), pytest.raises(TypeError, match="makes a float64 tensor"):
        torch.ones(2).double()


@each_setting
@pytest.mark.parametrize("norm", [None, 0.5])
@pytest.mark.parametrize("eager", ["foreach", "reference"])
def test_steps_and_clipping_do_not_need_float64(optimizer, options, norm, eager, narrow):
    def make():
        given = {"ema_decay": 0.9, "max_grad_norm": norm, "backend": eager, **options}
        return optimizer.ours(params(), **given)

    expected = run(make())
    with narrow():
        opt = make()
        found = run(opt)
    torch.testing.assert_close(found, expected)
    if norm is not None:
        assert opt.grad_norm.dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, fused_ema.GradScaler])
def test_a_scaled_step_does_not_need_float64(kind, narrow):
    def make(poison: float):
        opt = FusedScaledAdamW(
            params(), lr=0.1, ema_decay=0.9, fused=True, backend="foreach", max_grad_norm=0.5
        )
        opt.param_groups[0]["params"][0].grad[0] = poison
        return opt

    def scaled(opt):
        scaler = kind("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        scaler.step(opt)
        return [p.detach().clone() for p in opt.param_groups[0]["params"]]

    for poison in (1.0, math.inf):
        expected = scaled(make(poison))
        with narrow():
            found = scaled(make(poison))
        torch.testing.assert_close(found, expected)


def test_gradients_reach_a_learning_rate_there(narrow):
    with narrow():
        lr = torch.tensor(0.1, requires_grad=True)
        param = torch.ones(3, requires_grad=True).clone()
        param.grad = torch.ones(3)
        FusedScaledSGD([param], lr=lr, differentiable=True).step()
        param.sum().backward()
    assert lr.grad == -3.0


def test_snapshots_are_summed_there(narrow):
    snapshots = [{"w": torch.linspace(0, 1, 4)}, {"w": torch.linspace(1, 3, 4)}]
    with narrow():
        found = reconstruct(snapshots, [0.25, 0.75])
    torch.testing.assert_close(found["w"], 0.25 * snapshots[0]["w"] + 0.75 * snapshots[1]["w"])


def test_what_comes_from_another_device_is_converted(monkeypatch):
    monkeypatch.setitem(dtypes.NARROW, "meta", torch.float32)
    assert Control(torch.zeros(6, dtype=torch.float64), decided=True).on(META).dtype == (
        torch.float32
    )
    sums = torch.zeros(1, device=META)
    ending = Ending.of(Treatment(max_norm=torch.ones((), dtype=torch.float64)), sums)
    assert ending.control.dtype == torch.float32
    assert ending.max_norm.dtype == torch.float32


def test_capturable_is_refused_there_with_a_reason(narrow):
    opt = FusedScaledSGD(params(), lr=0.1, capturable=True, backend="foreach")
    with narrow(), pytest.raises(RuntimeError, match="capturable=True"):
        opt.step()
