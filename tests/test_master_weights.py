"""16-bit parameters whose weights the optimizer holds in float32."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import twins
from cases import CHANNELS_LAST, CHUNK, FEW
from graphs import Graph
from optimizers import each_setting
from torch import nn

import fused_ema

SHAPES = (*FEW, (CHUNK + 5,), CHANNELS_LAST[0])
HALVES = (torch.bfloat16, torch.float16)


def halves_and_floats(dtype: torch.dtype, shapes=SHAPES) -> tuple[list, list]:
    """Parameters, and float32 ones that start where they do."""
    params = twins.parameters(shapes, dtype)
    for p in params:
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return params, [nn.Parameter(p.detach().float()) for p in params]


def set_gradients(step: int, params, floats, missing: int | None = None) -> None:
    twins.set_gradients(step, params)
    for i, (p, q) in enumerate(zip(params, floats, strict=True)):
        if i == missing:
            p.grad = None
        q.grad = None if p.grad is None else p.grad.float()


def assert_follows(opt, twin, params, floats) -> None:
    """The optimizer's weights, moments and averages are the bits of a float32 run."""
    for p, q in zip(params, floats, strict=True):
        assert torch.equal(p, q.to(p.dtype))
        held, expected = opt.state[p], twin.state[q]
        assert torch.equal(held["master"], q)
        assert held.keys() == {"master", *expected}
        for key, value in expected.items():
            assert held[key].dtype == value.dtype
            assert torch.equal(held[key], value), key


@each_setting
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_bits_of_a_float32_run(dtype, optimizer, options, backend):
    cls, (params, floats) = optimizer.ours, halves_and_floats(dtype)
    order = "before" if options is optimizer.options else "after"
    options = {**options, "lr": 1e-2, "kappa": 2.0, "ema_decay": (0.9, 0.99), "backend": backend}
    opt = cls(params, master_weights=True, ema_order=order, **options)
    twin = cls(floats, ema_order=order, **options)
    for step in range(5):
        set_gradients(step, params, floats, missing=step if step in (2, 4) else None)
        opt.step()
        twin.step()
        assert_follows(opt, twin, params, floats)
    assert set(opt.backends) == {backend}


def test_small_steps_are_not_lost(backend):
    """Each is less than half a unit of the parameter's last place."""
    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    opt = fused_ema.FusedScaledSGD([p], lr=1e-3, master_weights=True, backend=backend)
    plain = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    without = fused_ema.FusedScaledSGD([plain], lr=1e-3, backend=backend)
    for _ in range(100):
        p.grad, plain.grad = torch.ones_like(p), torch.ones_like(plain)
        opt.step()
        without.step()
    assert torch.equal(plain.detach(), torch.ones_like(plain))
    torch.testing.assert_close(p.detach().float(), torch.full((64,), 0.9), rtol=4e-3, atol=0.0)


def test_other_parameters_need_no_master():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
    opt = fused_ema.FusedScaledSGD([*params, frozen], ema_decay=0.9, master_weights=True)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert not any("master" in state for state in opt.state.values())
    frozen.requires_grad_(True)
    frozen.grad = torch.ones_like(frozen)
    opt.step()
    assert opt.state[frozen]["master"].dtype == torch.float32


def test_a_resumed_run_is_bit_exact():
    cls, flags = fused_ema.FusedScaledAdamW, {"weight_decay": 0.5}
    (params, floats), (others, _) = halves_and_floats(torch.bfloat16), halves_and_floats(HALVES[0])
    opt, twin = cls(params, master_weights=True, **flags), cls(floats, **flags)
    for step in range(3):
        set_gradients(step, params, floats)
        opt.step()
        twin.step()
    saved = deepcopy(opt.state_dict())
    other = cls(others, master_weights=True, **flags)
    other.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    for step in range(3, 6):
        set_gradients(step, others, floats)
        other.step()
        twin.step()
        assert_follows(other, twin, others, floats)


def test_it_may_be_turned_on_and_off():
    """A master begins where the parameter is, not where an older one was left."""
    params, _ = halves_and_floats(torch.bfloat16, FEW)
    opt = fused_ema.FusedScaledAdamW(params)
    for step, on in enumerate((False, True, True, False, True)):
        opt.param_groups[0]["master_weights"] = on
        twins.set_gradients(step, params)
        if not on:
            for p in params:
                p.data.add_(1.0)
        before = [p.detach().float() for p in params]
        opt.step()
        for p, old in zip(params, before, strict=True):
            assert ("master" in opt.state[p]) is on
            assert opt.state[p]["exp_avg"].dtype == (torch.float32 if on else torch.bfloat16)
            if on:
                assert torch.equal(p, opt.state[p]["master"].to(p.dtype))
                # a step of Adam moves a weight by a few times lr, here 1e-3
                torch.testing.assert_close(opt.state[p]["master"], old, rtol=2e-2, atol=2e-2)


def test_weights_come_back_from_a_swap():
    params, _ = halves_and_floats(torch.bfloat16, FEW)
    opt = fused_ema.FusedScaledAdamW(params, ema_decay=0.5, master_weights=True)
    twins.set_gradients(0, params)
    opt.step()
    before = [(p.clone(), opt.state[p]["master"].clone()) for p in params]
    with opt.ema_weights():
        for p in params:
            assert torch.equal(p, opt.state[p]["ema"].to(p.dtype))
    for p, (weight, master) in zip(params, before, strict=True):
        assert torch.equal(p, weight)
        assert torch.equal(opt.state[p]["master"], master)


def test_a_replayed_graph_goes_on(monkeypatch):
    params, floats = halves_and_floats(torch.bfloat16, FEW)
    options = {"capturable": True, "backend": "triton", "ema_decay": 0.9}
    opt = fused_ema.FusedScaledAdamW(params, master_weights=True, **options)
    twin = fused_ema.FusedScaledAdamW(floats, **options)
    graph = Graph(monkeypatch)
    for step in range(4):
        set_gradients(step, params, floats)
        if step == 0:
            keep = [(p, p.grad, q, q.grad) for p, q in zip(params, floats, strict=True)]
        for p, grad, q, grad_of_q in keep:
            grad.copy_(p.grad)
            grad_of_q.copy_(q.grad)
            p.grad, q.grad = grad, grad_of_q
        if step == 1:
            graph.capture(opt)
        opt.step() if step == 0 else graph.replay()
        twin.step()
        assert_follows(opt, twin, params, floats)
