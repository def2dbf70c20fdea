"""Averages in 16 bits: the rounding, its random bits, and what the formats lose."""

from __future__ import annotations

import copy
from copy import deepcopy
from itertools import product

import numpy as np
import pytest
import torch
import twins
from cases import CHANNELS_LAST, CHUNK, FEW
from torch import nn

from fused_ema import FusedEMA, FusedScaledAdamW, FusedScaledSGD, _native
from fused_ema.ema import formats

TARGETS = _native.cpu_targets()
BITS = 0xFFFF  # all random bits of an element
ROUND = {torch.bfloat16: formats.round_bfloat16, torch.float16: formats.round_float16}


# More than a program of Triton's steps; its interpreter is slow.
LARGE = 4396


def parameters(dtype: torch.dtype = torch.float32, large: int = LARGE) -> list[nn.Parameter]:
    params = twins.parameters((*FEW, (large,), CHANNELS_LAST[0]), dtype)
    for p in params:
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return params


def neighbours(value: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of the format next to a value, towards zero and away from it."""
    near = value.to(dtype)
    outwards = torch.full_like(near, float("inf")).copysign(near)
    inner = torch.where(near.abs() > value.abs(), torch.nextafter(near, 0 * near), near)
    outer = torch.where(near.abs() < value.abs(), torch.nextafter(near, outwards), near)
    return inner.double(), outer.double()


@pytest.mark.parametrize("dtype", ROUND, ids=str)
def test_rounding_is_unbiased_between_neighbours(dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-7.2, 4, 200) if dtype == torch.float16 else torch.logspace(-30, 30, 200)
    values = torch.randn(200, generator=generator) * scale
    values[:4] = torch.tensor([0.0, -0.0, 1.0, -0.5])
    draws = 4096
    bits = formats.element_bits(7, 0, 0, torch.empty(draws, 200))
    rounded = ROUND[dtype](values.expand(draws, 200).contiguous(), bits).double()
    inner, outer = neighbours(values, dtype)
    assert bool(((rounded == inner) | (rounded == outer)).all())
    gap = (outer - inner).abs()
    bias = (rounded.mean(0) - values.double()).abs()
    # four standard errors of a mean of draws that are at most a gap apart, and the bits' own unit
    assert bool((bias <= gap * (4 * 0.5 / draws**0.5 + 2.0**-13)).all())


def test_special_numbers():
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e38, -7e4, 65504.0])
    bits = torch.full((6,), BITS)
    bf16 = formats.round_bfloat16(special, bits)
    assert torch.equal(bf16[:2], special[:2].bfloat16())
    assert bool(bf16[2].isnan())
    half = formats.round_float16(special, bits)
    expected = [65504.0, -65504.0, None, 65504.0, -65504.0, 65504.0]
    assert [v.item() for i, v in enumerate(half) if i != 2] == [e for e in expected if e]
    assert bool(half[2].isnan())


def finalizer(h: np.ndarray) -> np.ndarray:
    """MurmurHash3's, in numpy, whose integers wrap by themselves."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def test_the_hash_is_murmurs():
    numbers = np.array([0, 1, 2, 0xFFFFFFFF, 0x80000000, 123456789], dtype=np.uint32)
    expected = finalizer(numbers).astype(np.int64)
    assert torch.equal(
        formats.mix(torch.from_numpy(numbers.astype(np.int64))), torch.from_numpy(expected)
    )
    assert [formats.mix(int(n)) for n in numbers] == expected.tolist()


STREAMS = (0, 1, 2, formats.FIRST_STATE, formats.FIRST_STATE + 1, formats.FIRST_STATE + 2)


@pytest.mark.parametrize("stream", STREAMS)
def test_neighbours_take_the_halves_of_a_hash(stream):
    seed, tensor, count = 0xDEADBEEF, 3, 11
    (key,) = finalizer(np.uint32([seed]) ^ finalizer(np.uint32([tensor])))
    pairs = np.arange((count + 1) // 2, dtype=np.uint32)
    step = np.uint32(stream * 2654435761 % 2**32)
    hashes = finalizer(key ^ step ^ pairs ^ finalizer(np.uint32([0])))
    expected = hashes.astype("<u4").view("<u2")[:count].astype(np.int64)
    drawn = formats.element_bits(seed, tensor, stream, torch.empty(count))
    assert drawn.tolist() == expected.tolist()


def assert_independent(coins: torch.Tensor) -> None:
    """Fair coins, a row of the same 4096 flips each: five standard deviations."""
    signs = coins.double() * 2 - 1
    count = signs.shape[1]
    assert count == 4096
    assert bool((signs.mean(1).abs() < 5 / 64).all())
    correlation = (signs @ signs.T / count).fill_diagonal_(0.0)
    assert float(correlation.abs().max()) < 5 / 64


def test_bits_differ_by_seed_step_tensor_average_and_element():
    like = torch.empty(4096)
    keys = list(product((0, 1), (0.0, 1.0, 2.5), (0, 1), STREAMS))
    drawn = torch.stack(
        [formats.element_bits(formats.step_seed(s, b), t, k, like) for s, b, t, k in keys]
    )
    for bit in (15, 12, 0):  # the first of what bfloat16 and float16 cut off, and the last
        assert_independent(drawn >> bit & 1)


def test_bits_of_an_element_and_its_neighbour_are_independent():
    drawn = formats.element_bits(formats.step_seed(0, 1.0), 0, 0, torch.empty(2 * 4096))
    coins = [drawn[first::2] >> bit & 1 for first in (0, 1) for bit in range(16)]
    assert_independent(torch.stack(coins))


def run(form: str, backend: str, dtype=torch.float32, large: int = LARGE, **options):
    params = parameters(dtype, large)
    options = {"lr": 1e-2, "ema_decay": (0.9, 0.3), "kappa": 2.0, **options}
    opt = FusedScaledAdamW(params, ema_format=form, rounding_seed=5, backend=backend, **options)
    for step in range(4):
        twins.set_gradients(step, params)
        if step == 2:
            params[2].grad = None
        opt.step()
    assert set(opt.backends) == {backend}
    return opt, params


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["bf16", "delta"])
def test_backends_follow_the_specification(form, dtype, master, order, backend, monkeypatch):
    """The same bits, but where a weight differs in its last one and the rounding with it."""
    options = {"dtype": dtype, "master_weights": master, "ema_order": order}
    expected, params = run(form, "reference", **options)
    for target in TARGETS if backend == "native" else ("",):
        monkeypatch.setenv("FUSED_EMA_CPU", target)
        found, others = run(form, backend, **options)
        for p, q in zip(params, others, strict=True):
            for key in ("ema", "ema_1"):
                kept, other = expected.state[p][key], found.state[q][key]
                assert kept.dtype == other.dtype == formats.DTYPES[form]
                assert int((kept != other).sum()) <= max(1, 0.01 * p.numel())
                averages = (
                    formats.average(s[key], s.get("master", w.detach())).float()
                    for s, w in ((expected.state[p], p), (found.state[q], q))
                )
                torch.testing.assert_close(*averages, rtol=2.0**-7, atol=2e-5)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("form", ["bf16", "delta"])
def test_device_kernels_draw_the_native_bits(form, capturable, device_backend):
    """Seeds of capturable groups are made on the device, of what it has counted."""
    expected, params = run(form, "native")
    found, others = run(form, device_backend, capturable=capturable)
    twins.assert_same(expected, found, rtol=0.0, atol=0.0)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(expected.state[p]["ema_1"], found.state[q]["ema_1"])


def test_bits_do_not_depend_on_threads_or_targets(monkeypatch):
    results = []
    try:
        for threads, target in ((1, TARGETS[-1]), (2, TARGETS[-1]), (3, TARGETS[0])):
            torch.set_num_threads(threads)
            monkeypatch.setenv("FUSED_EMA_CPU", target)
            for form in ("bf16", "delta"):
                opt, params = run(form, "native", large=CHUNK + 300)
                results.append([opt.state[p][key] for p in params for key in ("ema", "ema_1")])
    finally:
        torch.set_num_threads(2)
    for k in (0, 1):
        for other in results[k + 2 :: 2]:
            for a, b in zip(results[k], other, strict=True):
                assert torch.equal(a, b)


def simulated(form: str, rho: float, steps: int) -> float:
    """Error of an average, relative to its distance from weights that travel to a random target."""
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.randn(20_000, generator=generator) for _ in "ab")
    p = nn.Parameter(start.clone())
    opt = FusedScaledSGD([p], lr=1.0, ema_decay=rho, ema_format=form)
    exact = start.double()
    for _ in range(steps):
        p.grad = (start - target) / steps
        opt.step()
        exact = rho * exact + (1 - rho) * p.detach().double()
    found = formats.average(opt.state[p]["ema"], p.detach()).double()
    return float((found - exact).norm() / (exact - p.detach().double()).norm())


@pytest.mark.parametrize("rho", [0.99, 0.999, 0.9999])
def test_a_difference_stays_close(rho):
    error = simulated("delta", rho, 3000)
    assert error < 0.1
    assert error < simulated("bf16", rho, 3000)


def test_formats_are_read_as_averages():
    model = nn.Linear(4, 3)
    opt = FusedScaledSGD(model.parameters(), lr=0.1, ema_decay=0.5, ema_format="delta", model=model)
    full = copy.deepcopy(model)
    twin = FusedScaledSGD(full.parameters(), lr=0.1, ema_decay=0.5)
    for step in range(3):
        twins.set_gradients(step, list(model.parameters()), list(full.parameters()))
        opt.step()
        twin.step()
    assert opt.state[model.weight]["ema"].dtype == torch.float16
    average, exact = opt.ema_state_dict(model), twin.ema_state_dict(full)
    other = nn.Linear(4, 3)
    opt.copy_ema_to(other)
    weights = [p.detach().clone() for p in model.parameters()]
    with opt.ema_weights():
        for key, value in model.state_dict().items():
            assert torch.equal(value, average[key])
            assert torch.equal(value, other.state_dict()[key])
            torch.testing.assert_close(value, exact[key], rtol=0.0, atol=2e-3)
    assert all(map(torch.equal, weights, model.parameters()))


@pytest.mark.parametrize("form", ["bf16", "delta"])
def test_a_resumed_run_is_bit_exact(form):
    opt, params = run(form, "native")
    others = parameters()
    other = FusedScaledAdamW(others, lr=1e-2, ema_decay=(0.9, 0.3), ema_format=form)
    other.load_state_dict(deepcopy(opt.state_dict()))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    for step in range(4, 7):
        twins.set_gradients(step, params, others)
        opt.step()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(opt.state[p]["ema"], other.state[q]["ema"])


def test_the_format_may_change():
    """The average goes on, rounded where it must be."""
    params, others = parameters(), parameters()
    opt, twin = (FusedScaledSGD(p, lr=0.1, ema_decay=0.9) for p in (params, others))
    for step, form in enumerate(("full", "delta", "delta", "bf16", "full")):
        opt.param_groups[0]["ema_format"] = form
        twins.set_gradients(step, params, others)
        opt.step()
        twin.step()
        for p, q in zip(params, others, strict=True):
            found = formats.average(opt.state[p]["ema"], p.detach())
            assert opt.state[p]["ema"].dtype == formats.DTYPES.get(form, torch.float32)
            torch.testing.assert_close(found.float(), twin.state[q]["ema"], rtol=2e-2, atol=1e-2)


def test_a_bfloat16_teacher():
    model = nn.Linear(4, 3)
    teacher = copy.deepcopy(model).bfloat16()
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.5, teacher=teacher, ema_format="bf16")
    twins.set_gradients(0, list(model.parameters()))
    opt.step()
    assert opt.state[model.weight]["ema"] is teacher.weight
    for form, dtype in (("full", torch.bfloat16), ("bf16", torch.float32), ("bf16", torch.half)):
        with pytest.raises(ValueError, match=rf"has dtype torch\.{str(dtype)[6:]}; allowed"):
            FusedScaledSGD(
                model.parameters(), ema_decay=0.5, teacher=teacher.to(dtype), ema_format=form
            )


def test_a_difference_takes_no_teacher():
    """Whichever way the two come together; nothing has moved then."""
    model = nn.Linear(4, 3)
    refused = pytest.raises(
        ValueError, match=r"teacher: received a teacher .*'delta'; allowed: .*'full', or 'bf16'"
    )
    for dtype in (torch.float32, torch.bfloat16):
        teacher = copy.deepcopy(model).to(dtype)
        with refused:
            FusedScaledSGD(model.parameters(), ema_decay=0.5, teacher=teacher, ema_format="delta")
    opt = FusedScaledSGD([model.weight], ema_decay=0.5, ema_format="delta")
    with refused:
        opt.add_param_group({"params": [model.bias], "teacher": [teacher.bias]})
    assert len(opt.param_groups) == 1
    opt = FusedScaledSGD(model.parameters(), ema_decay=0.5, teacher=teacher, ema_format="bf16")
    opt.param_groups[0]["ema_format"] = "delta"
    twins.set_gradients(0, list(model.parameters()))
    before = deepcopy([*model.parameters(), *teacher.parameters()])
    with refused:
        opt.step()
    assert all(map(torch.equal, before, [*model.parameters(), *teacher.parameters()]))
    assert not opt.state_dict()["state"]


def test_a_teachers_groups_have_one_format():
    model = nn.Linear(4, 3)
    groups = [
        {"params": [p], "ema_format": form}
        for p, form in zip(model.parameters(), ("full", "bf16"), strict=True)
    ]
    with pytest.raises(ValueError, match="allowed: the same in all groups"):
        FusedScaledSGD(groups, ema_decay=0.5, teacher=copy.deepcopy(model), model=model)


def test_a_bfloat16_teachers_buffers_are_averaged_in_full_or_not_at_all():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    teacher = copy.deepcopy(model).bfloat16()
    options = {"ema_decay": 0.9, "ema_format": "bf16", "model": model}
    with pytest.raises(ValueError, match=r"ema_buffers='average': .*running_mean.*bfloat16"):
        FusedScaledSGD(model.parameters(), teacher=teacher, ema_buffers="average", **options)
    FusedScaledSGD(model.parameters(), teacher=teacher, ema_buffers="copy", **options)
    for name in ("running_mean", "running_var"):
        setattr(teacher[1], name, getattr(teacher[1], name).float())
    FusedScaledSGD(model.parameters(), teacher=teacher, ema_buffers="average", **options)


@pytest.mark.parametrize("forms", [("delta", "full"), ("delta", "bf16"), ("full", "bf16")])
def test_a_checkpoint_of_another_format_becomes_the_teachers(forms):
    saved, held = forms
    p, q = (nn.Parameter(torch.ones(2)) for _ in "pq")
    opt = FusedScaledSGD([p], lr=0.1, ema_decay=0.75, ema_format=saved)
    teacher = torch.zeros(2, dtype=torch.float32 if held == "full" else torch.bfloat16)
    other = FusedScaledSGD([q], lr=0.1, ema_decay=0.75, teacher=[teacher], ema_format=held)
    for _ in range(2):
        p.grad = torch.ones(2)
        opt.step()
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(opt.state_dict())
    average = 0.75 * (0.75 + 0.25 * 0.9) + 0.25 * 0.8
    tolerance = 2**-12 if held == "full" else 2**-8
    torch.testing.assert_close(teacher.float(), torch.full((2,), average), rtol=tolerance, atol=0)
    assert other.param_groups[0]["ema_format"] == held
    q.grad = torch.ones(2)
    other.step()
    average = 0.75 * average + 0.25 * 0.7
    tolerance = 2**-12 if held == "full" else 2**-7
    torch.testing.assert_close(teacher.float(), torch.full((2,), average), rtol=tolerance, atol=0)


def test_a_difference_that_rests_does_not_follow_the_weights(backend):
    p = nn.Parameter(torch.zeros(2))
    opt = FusedScaledSGD([p], lr=1.0, ema_decay=1.0, ema_format="delta", backend=backend)
    for decay in (1.0, None, None, 1.0):
        opt.param_groups[0]["ema_decay"] = decay
        p.grad = torch.full((2,), -1.0)
        opt.step()
    assert torch.equal(p.detach(), torch.full((2,), 4.0))
    assert torch.equal(formats.average(opt.state[p]["ema"], p.detach()), torch.zeros(2))


def test_what_the_formats_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="ema_format='fp8' is not known"):
        FusedScaledSGD(parameters(), ema_decay=0.9, ema_format="fp8")
    opt = FusedScaledSGD(parameters(torch.float64), ema_decay=0.9, ema_format="delta")
    with pytest.raises(
        TypeError, match=r"ema_format='delta': a parameter has dtype torch\.float64"
    ):
        opt.step()
    with pytest.raises(ValueError, match="ema_every=2 with ema_format='delta'; allowed: 1"):
        FusedScaledSGD(parameters(), ema_decay=0.9, ema_format="delta", ema_every=2)
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match=r"rounding_seed=.* is out of range"):
            FusedScaledSGD(parameters(), ema_decay=0.9, ema_format="bf16", rounding_seed=seed)
    with pytest.raises(ValueError, match="ema_format='delta': another optimizer moves the weights"):
        FusedEMA(torch.optim.SGD(parameters(), lr=0.1), 0.9, ema_format="delta")


def test_no_finite_number_rounds_to_infinity():
    largest = torch.finfo(torch.bfloat16).max
    values = torch.tensor([largest, -largest, 3.4e38, -3.4e38, torch.finfo(torch.float32).max])
    for mask in (0, BITS):
        rounded = formats.round_bfloat16(values, torch.full((5,), mask)).float()
        assert torch.equal(rounded, values.sign() * largest)


# what a format cannot follow, and what it can
SLOW = [("delta", 0.99995), ("delta", (0.9, 0.99999)), ("bf16", 0.999995)]
FAST = [("delta", 0.9999), ("delta", 1.0), ("bf16", 0.99999), ("full", 0.9999999), ("bf16", None)]


@pytest.mark.parametrize(("form", "decay"), SLOW)
def test_an_average_too_slow_for_its_format_warns_once(form, decay, recwarn):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = FusedScaledSGD(
        [{"params": [p]} for p in params], lr=0.1, ema_decay=decay, ema_format=form
    )
    for step in range(4):
        for group in opt.param_groups:
            group["lr"] = 0.1 / (step + 1)
        opt.kappa = 1.0 + step / 4
        opt.step()
    (warning,) = recwarn
    smallest = 1.0 - max(decay if isinstance(decay, tuple) else (decay,))
    expected = f"ema_format='{form}' with 1 - ema_decay**kappa = {smallest:.3g}: below"
    assert str(warning.message).startswith(expected)


@pytest.mark.parametrize(("form", "decay"), FAST)
def test_averages_that_a_format_can_follow_do_not_warn(form, decay):
    params = [nn.Parameter(torch.ones(2))]
    FusedScaledSGD(params, lr=0.1, ema_decay=decay, ema_format=form).step()


def test_kappa_makes_a_slow_average_fast_enough():
    params = [nn.Parameter(torch.ones(2))]
    opt = FusedScaledSGD(params, lr=0.1, ema_decay=0.99999, ema_format="delta", kappa=16.0)
    opt.step()
    opt.kappa = 2.0
    with pytest.warns(UserWarning, match="= 2e-05: below 0.0001"):
        opt.step()
