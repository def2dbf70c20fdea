"""Moments in 16 bits: rounded stochastically at every step."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import twins
from cases import FEW

from fused_ema import FusedScaledAdam, FusedScaledAdamW, FusedScaledSGD, _native

# The last is more than a program of Triton's steps.
parameters = partial(twins.parameters, (*FEW, (4396,)))
BETAS = 0.9, 0.99


def run(backend: str, dtype=torch.float32, steps: int = 4, **options):
    params = parameters(dtype)
    options = {"lr": 1e-2, "betas": BETAS, "ema_decay": 0.9, "kappa": 2.0, **options}
    opt = FusedScaledAdamW(params, state_format="bf16", backend=backend, **options)
    for step in range(steps):
        twins.set_gradients(step, params)
        opt.step()
    assert set(opt.backends) == {backend}
    return opt, params


def test_moments_are_rounded_to_a_neighbour_without_bias(backend):
    """A step from the moments as they are stored, in float64."""
    opt, params = run(backend, steps=3)
    p = params[-1]
    beta1, beta2 = (beta**2.0 for beta in BETAS)
    before = {key: opt.state[p][key].double() for key in ("exp_avg", "exp_avg_sq")}
    twins.set_gradients(3, params)
    opt.step()
    grad = p.grad.double()
    for key, exact in (
        ("exp_avg", beta1 * before["exp_avg"] + (1 - beta1) * grad),
        ("exp_avg_sq", beta2 * before["exp_avg_sq"] + (1 - beta2) * grad**2),
    ):
        stored = opt.state[p][key]
        assert stored.dtype == torch.bfloat16
        # eight bits: neighbours are at most 2**-7 of a number apart; float32 blurs it by 2**-22
        error = (stored.double() - exact) / exact.abs()
        assert float(error.abs().max()) < 2.0**-7 + 2.0**-20
        assert float(error.abs().max()) > 2.0**-8  # beyond what rounding to nearest may lose
        # independent errors of at most 2**-7: five standard errors of their mean
        assert abs(float(error.mean())) < 5 * 2.0**-7 / len(error) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_backends_draw_the_same_bits(amsgrad, dtype, backend, monkeypatch):
    """The same numbers, but where arithmetic differs in a last bit and the rounding with it."""
    options = {"dtype": dtype, "master_weights": dtype != torch.float32, "amsgrad": amsgrad}
    expected, params = run("reference", **options)
    for target in _native.cpu_targets() if backend == "native" else ("",):
        monkeypatch.setenv("FUSED_EMA_CPU", target)
        found, others = run(backend, **options)
        for p, q in zip(params, others, strict=True):
            keys = [key for key in expected.state[p] if key.startswith(("exp", "max"))]
            assert len(keys) == 2 + amsgrad
            for key in keys:
                kept, other = expected.state[p][key], found.state[q][key]
                assert kept.dtype == other.dtype == torch.bfloat16
                assert int((kept != other).sum()) <= 0.01 * p.numel()
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("form", ["full", "bf16", "delta"])
@pytest.mark.parametrize("capturable", [False, True])
def test_device_kernels_draw_the_native_bits(capturable, form, device_backend):
    """Seeds of capturable groups are made on the device, of what it has counted."""
    expected, params = run("native", ema_format=form)
    found, _ = run(device_backend, ema_format=form, capturable=capturable)
    assert expected.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    twins.assert_same(expected, found, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kernels", ["reference", "foreach", "native"])
def test_a_second_moment_arrives(kernels):
    """Rounded to nearest it would stop at a third of the way: (1 - beta)*(g*g - v) is too small."""
    p = torch.nn.Parameter(torch.zeros(512))
    opt = FusedScaledAdam([p], betas=(0.9, 0.999), state_format="bf16", backend=kernels)
    for _ in range(5000):
        p.grad = torch.full_like(p, 3.0)
        opt.step()
    expected = 9.0 * (1 - 0.999**5000)
    # each wanders by about 5 %: 2**-7 / sqrt(12) a step, over some 500 steps; this is a mean
    assert float(opt.state[p]["exp_avg_sq"].float().mean()) == pytest.approx(expected, rel=0.01)


def test_momentum_too():
    (p,) = parameters(torch.float32)[-1:]
    opt = FusedScaledSGD([p], lr=0.1, momentum=0.9, state_format="bf16")
    for step in range(2):
        twins.set_gradients(step, [p])
        opt.step()
    assert opt.state[p]["momentum_buffer"].dtype == torch.bfloat16


def test_a_resumed_run_is_bit_exact(backend):
    opt, params = run(backend)
    others = parameters(torch.float32)
    other = FusedScaledAdamW(
        others, lr=1e-2, betas=BETAS, ema_decay=0.9, state_format="bf16", backend=backend
    )
    other.load_state_dict(deepcopy(opt.state_dict()))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    for step in range(4, 7):
        twins.set_gradients(step, params, others)
        opt.step()
        other.step()
    twins.assert_same(opt, other, rtol=0.0, atol=0.0)


def test_the_format_may_change_and_torch_takes_the_state():
    opt, params = run("reference")
    theirs = torch.optim.AdamW(parameters(torch.float32), betas=BETAS)
    theirs.load_state_dict(opt.state_dict())
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        assert torch.equal(theirs.state[q]["exp_avg"], opt.state[p]["exp_avg"].float())
    other = FusedScaledAdamW(parameters(torch.float32), state_format="bf16")
    other.load_state_dict(theirs.state_dict())
    opt.param_groups[0]["state_format"] = "full"
    before = [opt.state[p]["exp_avg"].float() for p in params]
    for p in params:
        p.grad = None
    opt.step()
    for p, kept, q in zip(params, before, other.param_groups[0]["params"], strict=True):
        assert opt.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(opt.state[p]["exp_avg"], kept)
        assert torch.equal(other.state[q]["exp_avg"].float(), kept)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="state_format='fp8' is not known"):
        FusedScaledSGD(parameters(torch.float32), state_format="fp8")
    for dtype in (torch.float64, torch.bfloat16):
        opt = FusedScaledAdam(parameters(dtype), state_format="bf16")
        with pytest.raises(TypeError, match=f"state_format='bf16': a parameter has dtype {dtype}"):
            opt.step()
