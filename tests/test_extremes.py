"""Values at the ends of a format: infinities, differences and squares that overflow, denormals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DTYPES, EXACT_DTYPES
from optimizers import each_setting_in_torch
from tolerances import COMPUTE_OF, LERP_NEW, LERP_OLD, UNIT
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdam, FusedScaledAdamW, FusedScaledSGD, _native
from fused_ema import GradScaler as OwnGradScaler

INF = math.inf
RHOS = (1.0, 0.9, 0.3, 0.0)  # weights on both sides of 1/2, and both ends


def special(dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    values = [0.0, 1.5, -2.5, info.tiny, info.max, info.min, 0.9 * info.max, INF, -INF, math.nan]
    return torch.tensor(values, dtype=dtype)


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every special value beside every other, and itself."""
    values = special(dtype)
    both = torch.cartesian_prod(values, values)
    return both[:, 0].clone(), both[:, 1].clone()


def exact_lerp(start: float, end: float, weight: float) -> np.longdouble:
    """The weighted mean of two extended reals; one of weight 0 does not count."""
    terms = [(1.0 - weight, start), (weight, end)]
    shares = [np.longdouble(w) * np.longdouble(x) for w, x in terms if w != 0.0]
    with np.errstate(invalid="ignore"):
        return sum(shares, np.longdouble(0))


def optimizer_of(params, backend: str, **kwargs) -> FusedScaledSGD:
    return FusedScaledSGD(params, lr=0.1, backend=backend, **kwargs)


def averages_after(start, end, backend: str, **kwargs) -> tuple[list[torch.Tensor], ...]:
    """All averages after a step on ``start``, where they begin, and after one on ``end``."""
    p = nn.Parameter(start.clone())
    opt = optimizer_of([p], backend, ema_decay=RHOS, **kwargs)
    found = []
    for values in (start, end):
        with torch.no_grad():
            p.copy_(values)
        opt.step()
        keys = ["ema", *(f"ema_{k}" for k in range(1, len(RHOS)))]
        found.append([opt.state[p][key].clone() for key in keys])
    return tuple(found)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, and both NaN or neither."""
    return torch.equal(a.nan_to_num(7.0, INF, -INF), b.nan_to_num(7.0, INF, -INF)) and torch.equal(
        a.isnan(), b.isnan()
    )


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_of_all_pairs_of_special_values(backend, dtype, order):
    start, end = pairs(dtype)
    begun, found = averages_after(start, end, backend, ema_order=order)
    compute = COMPUTE_OF[dtype]
    for k, rho in enumerate(RHOS):
        assert same(begun[k], start.to(compute)), f"a constant moved at rho={rho}"
        weight = torch.tensor(1.0 - rho, dtype=compute).item()
        for a, b, average in zip(start.tolist(), end.tolist(), found[k].tolist(), strict=True):
            right = exact_lerp(a, b, weight)
            if not np.isfinite(right):
                np.testing.assert_equal(average, float(right), f"{a} to {b} at rho={rho}")
                continue
            old, new = (np.longdouble(abs(x) if math.isfinite(x) else 0.0) for x in (a, b))
            size = LERP_NEW * weight * (old + new) + LERP_OLD * (1.0 - weight) * old
            bound = UNIT[compute] * (size + 4 * torch.finfo(compute).smallest_normal)
            assert abs(np.longdouble(average) - right) <= bound, (a, b, rho, average)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["full", "bf16", "delta"])
def test_kernels_give_the_same_bits(form, dtype, monkeypatch):
    if form != "full" and dtype == torch.float64:
        pytest.skip("kept in full")
    start, end = pairs(dtype)
    results = []
    for target in _native.cpu_targets():
        monkeypatch.setenv("FUSED_EMA_CPU", target)
        results.append(averages_after(start, end, "native", ema_format=form)[1])
    results += [averages_after(start, end, b, ema_format=form)[1] for b in ("triton", "reference")]
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bf16_averages_of_special_values(backend, dtype):
    """Infinite only where the average is, else next to it or, at the end, the largest number."""
    start, end = pairs(dtype)
    begun, found = averages_after(start, end, backend, ema_format="bf16")
    largest = torch.finfo(torch.bfloat16).max
    nearest = start.float().clamp(-largest, largest).where(start.isfinite(), start.float())
    for k, rho in enumerate(RHOS):
        # begun at the nearest number, and rounded by random bits at that first step
        assert same(begun[k].isfinite(), start.isfinite())
        torch.testing.assert_close(
            begun[k].float(), nearest, rtol=2.0**-7, atol=1e-37, equal_nan=True
        )
        weight = torch.tensor(1.0 - rho, dtype=torch.float32).item()
        steps = zip(begun[k].float().tolist(), end.tolist(), strict=True)
        rights = [exact_lerp(*values, weight) for values in steps]
        for right, average in zip(rights, found[k].tolist(), strict=True):
            if np.isfinite(right):
                limited = max(min(right, np.longdouble(largest)), -np.longdouble(largest))
                assert abs(average - limited) <= 2.0**-7 * abs(limited) + 1e-37
            else:
                np.testing.assert_equal(average, float(right))


@pytest.mark.parametrize("order", ["after", "before"])
def test_differences_to_infinite_weights(backend, order):
    model = nn.ParameterList([torch.tensor([-INF, INF, 3e38, 1.0, 1.0])])
    kwargs = {"ema_decay": (0.9, 0.3), "ema_format": "delta", "ema_order": order}
    opt = optimizer_of(model.parameters(), backend, **kwargs)
    constant = model[0].detach().clone()
    for _ in range(3):
        opt.step()
        for k in range(2):
            assert torch.equal(opt.ema_state_dict(model, k)["0"], constant)
    with torch.no_grad():
        model[0][3] = INF
    for _ in range(3):
        opt.step()
        for k in range(2):
            average = opt.ema_state_dict(model, k)["0"]
            assert torch.equal(average[[0, 1, 2, 4]], constant[[0, 1, 2, 4]])
            assert order == "before" or average[3] == INF


@pytest.mark.parametrize(
    ("forms", "large"),
    [
        (("delta", "full", "bf16", "delta", "bf16", "full"), -8e3),
        (("full", "bf16", "full"), -3.4e38),  # which bfloat16 rounds to an infinity
    ],
)
def test_formats_convert_infinities(forms, large, backend):
    """An average of infinite weights goes through every format and stays what it is."""
    model = nn.ParameterList([torch.tensor([-INF, INF, large, 0.5])])
    opt = optimizer_of(model.parameters(), backend, ema_decay=0.9)
    opt.step()
    for form in forms:
        opt.param_groups[0]["ema_format"] = form
        opt.step()
        average = opt.ema_state_dict(model)["0"].float()
        assert torch.equal(average[[0, 1, 3]], model[0].detach()[[0, 1, 3]]), form
        assert bool(average[2].isfinite()), form


EXTREME = (1e-45, 1e-38, 1e-30, 1e-22, 1e-19, 1e15, 1.7e19, 2e19, 1e20, 5e20)


def extreme_gradients(step: int) -> torch.Tensor:
    """Gradients of each size: once and then ordinary ones, with alternating sign, and always."""
    sizes = torch.tensor(EXTREME, dtype=torch.float64)
    once = sizes if step == 0 else torch.full_like(sizes, 0.5)
    return torch.cat([once, sizes * (-1) ** step, sizes]).float()


def run(optimizer, dtype: torch.dtype, steps: int = 5) -> list[torch.Tensor]:
    p = nn.Parameter(torch.linspace(-1.0, 1.0, 3 * len(EXTREME)).to(dtype))
    opt = optimizer([p])
    path = []
    for step in range(steps):
        p.grad = extreme_gradients(step).to(dtype)
        opt.step()
        path.append(p.detach().double().clone())
    return path


@each_setting_in_torch
def test_extreme_gradients_do_no_harm_where_torch_stays_finite(backend, optimizer, options):
    torchs, kwargs, lr = optimizer.theirs, options, 1e-2
    found = run(lambda p: optimizer.ours(p, lr=lr, backend=backend, **kwargs), torch.float32)
    peer = run(lambda p: torchs(p, lr=lr, foreach=False, **kwargs), torch.float32)
    right = run(lambda p: torchs(p, lr=lr, foreach=False, **kwargs), torch.float64)
    for mine, other, exact in zip(found, peer, right, strict=True):
        finite = other.isfinite() & (exact.abs() < 3e38)
        error, allowed = (mine - exact).abs(), (other - exact).abs()
        bound = 4.0 * allowed + 32 * 2.0**-24 * (exact.abs() + 5 * lr)
        assert bool((error <= bound)[finite].all()), (error / bound)[finite].max()
        if optimizer.adaptive:
            assert bool(mine.isfinite().all())


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("state_format", ["full", "bf16"])
def test_the_second_moment_takes_what_its_weight_makes_finite(backend, amsgrad, state_format):
    """(1 - beta2)*g*g is 1e37, g*g is not in float32; later steps forget it at the right speed."""
    p = nn.Parameter(torch.ones(3))
    opt = FusedScaledAdamW([p], lr=0.1, amsgrad=amsgrad, state_format=state_format, backend=backend)
    for step in range(3):
        p.grad = torch.tensor([1e20, -1e20, 1.0]) if step == 0 else torch.ones(3)
        opt.step()
        expected = torch.tensor([1e37, 1e37]) * (0.999**step if not amsgrad else 1.0)
        key = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
        tolerance = 1e-5 if state_format == "full" else 2.0**-6
        torch.testing.assert_close(opt.state[p][key][:2].float(), expected, rtol=tolerance, atol=0)
        assert bool(p.isfinite().all())


def test_an_infinite_second_moment_parks_the_weight(backend):
    """As in torch: v stays infinite, and the update is zero, not NaN."""
    weights = []
    for make in (
        lambda p: FusedScaledAdam(p, lr=0.1, backend=backend),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    ):
        p = nn.Parameter(torch.ones(2))
        opt = make([p])
        for g in (1e30, 1.0, 1.0):
            p.grad = torch.tensor([g, 1.0])
            opt.step()
        weights.append(p.detach().clone())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_first_moments_of_opposite_huge_gradients(backend, dtype):
    largest = 0.9 * torch.finfo(dtype).max
    p = nn.Parameter(torch.zeros(2, dtype=dtype))
    opt = FusedScaledAdam([p], lr=1e-3, betas=(0.5, 0.999), backend=backend)
    p.grad = torch.tensor([largest, 1.0], dtype=dtype)
    opt.step()
    p.grad = torch.tensor([-largest, 1.0], dtype=dtype)
    opt.step()
    expected = torch.tensor([-largest / 4, 0.75], dtype=dtype)
    torch.testing.assert_close(opt.state[p]["exp_avg"], expected)


def test_decay_leaves_infinite_weights(backend):
    """As torch, which multiplies by 1 - lr*weight_decay."""
    start = torch.tensor([-INF, INF, 3e38, -3e38, 1.0])
    weights = []
    for make in (
        lambda p: FusedScaledAdamW(p, lr=0.1, weight_decay=0.5, ema_decay=0.9, backend=backend),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=False),
    ):
        p = nn.Parameter(start.clone())
        opt = make([p])
        for _ in range(2):
            p.grad = torch.zeros(5)
            opt.step()
        weights.append(p.detach().clone())
        if "ema" in opt.state[p]:
            assert torch.equal(opt.state[p]["ema"][:2], start[:2])
            assert bool(opt.state[p]["ema"][2:].isfinite().all())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("size", [1e19, 1e20, 3e38])
def test_the_norm_of_gradients_whose_squares_overflow(backend, size):
    """5,000 elements of one size: more than one chunk."""
    params = [nn.Parameter(torch.zeros(n)) for n in (7, 4993)]
    opt = optimizer_of(params, backend, max_grad_norm=2.0)
    for p in params:
        p.grad = torch.full_like(p, size)
    opt.step()
    torch.testing.assert_close(
        opt.grad_norm.cpu().double(), torch.tensor(size * 5000**0.5, dtype=torch.float64),
        rtol=1e-6, atol=0,
    )  # fmt: skip
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, -0.1 * 2.0 / 5000**0.5))


@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_a_norm_that_is_not_finite_stays_so(backend, bad):
    p = nn.Parameter(torch.zeros(5000))
    opt = optimizer_of([p], backend, max_grad_norm=2.0)
    p.grad = torch.ones(5000)
    p.grad[4321] = bad
    opt.step()
    np.testing.assert_equal(opt.grad_norm.item(), abs(bad))


def test_a_scaler_sees_no_overflow_in_large_finite_gradients(backend):
    p = nn.Parameter(torch.zeros(3))
    opt = optimizer_of([p], backend)
    scaler = OwnGradScaler(device="cpu", init_scale=4.0)
    p.grad = torch.full((3,), 4e20)
    scaler.scale(torch.zeros(()))  # makes the scale
    scaler.step(opt)
    scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((3,), -1e19))
    assert scaler.get_scale() == 4.0


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.bias = nn.Parameter(torch.tensor([0.0, -INF]), requires_grad=False)
        self.register_buffer("mask", torch.full((3, 3), -INF).triu(1))
        self.register_buffer("least", torch.tensor([3e38, -3e38]))


@pytest.mark.parametrize("wrapped", [False, True], ids=["own", "any"])
def test_frozen_masks_and_averaged_buffers_stay(backend, wrapped):
    model = Masked()
    kwargs = {"ema_decay": (0.9, 0.3), "model": model, "ema_buffers": "average", "backend": backend}
    if wrapped:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = FusedEMA(inner, **kwargs)
    else:
        inner = opt = FusedScaledAdamW(model.parameters(), **kwargs)
    for _ in range(3):
        model.linear(torch.ones(1, 3)).sum().backward()
        inner.step()
    for k in range(2):
        average = opt.ema_state_dict(model, k)
        for name in ("bias", "mask", "least"):
            assert torch.equal(average[name], model.state_dict()[name]), name
    model.least.neg_()
    inner.step()
    expected = [torch.tensor([0.8 * 3e38, -0.8 * 3e38]), torch.tensor([-0.4 * 3e38, 0.4 * 3e38])]
    for k in range(2):
        torch.testing.assert_close(opt.ema_state_dict(model, k)["least"], expected[k])


def test_resting_averages_stay_beside_infinite_weights(backend):
    """At the end of a cosine schedule rho is 1: nothing is left of new values."""
    p = nn.Parameter(torch.ones(4))
    opt = optimizer_of([p], backend, ema_decay=lambda t: 1.0 if t > 0 else 0.5)
    opt.step()
    with torch.no_grad():
        p.copy_(torch.tensor([INF, -INF, math.nan, 2.0]))
    opt.step()
    assert torch.equal(opt.state[p]["ema"], torch.ones(4))


def test_foreach_steps_only_extreme_tensors_one_by_one():
    """Counted in calls on lists, and in their lengths."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(9)]
    params[4] = nn.Parameter(torch.full((4,), -INF))
    lengths: list[int] = []

    class Lengths(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch._foreach_lerp_:
                lengths.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    opt = FusedScaledAdamW(params, ema_decay=0.9, weight_decay=0.0, backend="foreach")
    for p in params:
        p.grad = torch.ones(4)
    with Lengths():
        opt.step()
    assert lengths == [8, 8, 8]  # both moments and the average
    assert torch.equal(opt.state[params[4]]["ema"], params[4].detach())
    assert torch.equal(opt.state[params[0]]["ema"], opt.state[params[8]]["ema"])
