"""A bfloat16 teacher beside an average that is kept as a difference to the weights."""

from __future__ import annotations

import copy

import pytest
import torch
import twins
from cases import CHANNELS_LAST, FEW
from torch import nn

from fused_ema import FusedScaledAdamW, FusedScaledSGD, _native, load_ema

SCALE = 1024.0  # of the differences, by docs/numerics.md
# More than a program of Triton's steps; its interpreter is slow.
LARGE = 4396


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = twins.parameters((*FEW, (LARGE,), CHANNELS_LAST[0]), dtype)
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    return params


def rounded(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().to(torch.bfloat16, copy=True) for p in params]


def exact(opt: torch.optim.Optimizer, p: nn.Parameter) -> torch.Tensor:
    """The average by its definition."""
    state = opt.state[p]
    weight = state.get("master", p.detach())
    return weight.double() + state["ema"].double() / SCALE


def steps(opt: torch.optim.Optimizer, params: list[nn.Parameter], *numbers: int) -> None:
    for step in numbers:
        twins.set_gradients(step, params)
        if step == 2:
            params[2].grad = None
        opt.step()


def run(backend: str, dtype: torch.dtype = torch.float32, taught: bool = True, **options):
    params = parameters(dtype)
    teacher = rounded(params) if taught else None
    options = {"lr": 1e-2, "ema_decay": (0.9, 0.3), "kappa": 2.0, **options}
    opt = FusedScaledAdamW(params, ema=teacher, ema_format="delta", backend=backend, **options)
    steps(opt, params, 0, 1, 2, 3)
    assert set(opt.backends) == {backend}
    return opt, params, teacher


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_teacher_is_the_average_rounded(dtype, master, order, backend, monkeypatch):
    """And the average is the one that it is without a teacher, bit by bit."""
    options = {"dtype": dtype, "master_weights": master, "ema_order": order}
    for target in _native.cpu_targets() if backend == "native" else ("",):
        monkeypatch.setenv("FUSED_EMA_CPU", target)
        opt, params, teacher = run(backend, **options)
        alone, others, _ = run(backend, taught=False, **options)
        twins.assert_same(opt, alone, rtol=0.0, atol=0.0)
        for p, q, held in zip(params, others, teacher, strict=True):
            assert opt.state[p]["ema_teacher"] is held
            assert "ema_teacher" not in alone.state[q]
            # the sum is rounded to float32 first, and to bfloat16 then
            assert torch.equal(held, exact(opt, p).float().bfloat16())
            if p.numel() > 9:
                assert not torch.equal(held, p.detach().bfloat16())


@pytest.mark.parametrize("capturable", [False, True])
def test_device_kernels_write_it(capturable, device_backend):
    expected = run("native")
    found = run(device_backend, capturable=capturable)
    twins.assert_same(expected[0], found[0], rtol=0.0, atol=0.0)
    assert all(map(torch.equal, expected[2], found[2]))


@pytest.mark.parametrize("frozen", [False, True])
def test_it_starts_as_what_it_is(frozen, backend):
    """A rounded copy of the weights stands for the weights, anything else for itself."""
    p = nn.Parameter(torch.tensor([0.1, 1.3, -2.7]), requires_grad=not frozen)
    teacher = p.detach().bfloat16()
    teacher[1] = 5.0
    opt = FusedScaledSGD(
        [p], lr=0.0, ema_decay=0.5, ema=[teacher], ema_format="delta", backend=backend
    )
    if not frozen:
        p.grad = torch.zeros(3)
    opt.step()
    average = torch.tensor([0.1, (1.3 + 5.0) / 2, -2.7])
    torch.testing.assert_close(exact(opt, p).float(), average, rtol=0.0, atol=2e-3)
    assert torch.equal(exact(opt, p).float()[::2], p.detach()[::2])
    assert torch.equal(teacher, exact(opt, p).float().bfloat16())


def test_a_checkpoint_leaves_it_out_and_writes_it_when_loaded():
    opt, params, teacher = run("native")
    saved = copy.deepcopy(opt.state_dict())
    assert all("ema_teacher" not in state for state in saved["state"].values())
    others = parameters()
    theirs = rounded(others)
    other = FusedScaledAdamW(others, lr=1e-2, ema_decay=(0.9, 0.3), ema=theirs, ema_format="delta")
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    other.load_state_dict(saved)
    assert all(map(torch.equal, theirs, teacher))
    steps(opt, params, 4, 5)
    steps(other, others, 4, 5)
    twins.assert_same(opt, other, rtol=0.0, atol=0.0)
    assert all(map(torch.equal, theirs, teacher))
    assert all(
        other.state[q]["ema_teacher"] is held for q, held in zip(others, theirs, strict=True)
    )


def test_an_average_from_elsewhere_reaches_it():
    model, source = nn.Linear(4, 3), nn.Linear(4, 3)
    teacher = copy.deepcopy(model).bfloat16()
    opt = FusedScaledSGD(
        model.parameters(), ema_decay=0.9, ema=teacher, ema_format="delta", model=model
    )
    load_ema(opt, model, source.state_dict())
    difference = (source.weight - model.weight).detach() * SCALE
    assert torch.equal(opt.state[model.weight]["ema"], difference.half())
    assert torch.equal(teacher.weight, exact(opt, model.weight).float().bfloat16())


def test_a_skipped_step_leaves_it(device_backend):
    for backend in ("native", device_backend):
        opt, params, teacher = run(backend)
        before = [held.clone() for held in teacher]
        twins.set_gradients(4, params)
        opt.found_inf = torch.tensor(1.0)
        opt.step()
        assert all(map(torch.equal, before, teacher))


def test_the_format_may_change():
    """A teacher is the average itself in one format, its copy in the other."""
    params = parameters()
    teacher = rounded(params)
    opt = FusedScaledSGD(params, lr=0.1, ema_decay=0.9, ema=teacher, ema_format="bf16")
    for step, form in enumerate(("bf16", "delta", "bf16")):
        opt.param_groups[0]["ema_format"] = form
        steps(opt, params, step)
        for p, held in zip(params, teacher, strict=True):
            state = opt.state[p]
            assert (state["ema"] is held) == (form == "bf16")
            assert (state.get("ema_teacher") is held) == (form == "delta")
            if form == "delta":
                assert torch.equal(held, exact(opt, p).float().bfloat16())


def test_an_average_that_rests_does_not_follow_the_weights(backend):
    p = nn.Parameter(torch.zeros(2))
    teacher = p.detach().bfloat16()
    opt = FusedScaledSGD(
        [p], lr=1.0, ema_decay=1.0, ema=[teacher], ema_format="delta", backend=backend
    )
    for decay in (1.0, None, None, 1.0):
        opt.param_groups[0]["ema_decay"] = decay
        p.grad = torch.full((2,), -1.0)
        opt.step()
    assert torch.equal(p.detach(), torch.full((2,), 4.0))
    assert torch.equal(exact(opt, p), torch.zeros(2).double())
    assert torch.equal(teacher, torch.zeros(2).bfloat16())


@pytest.mark.parametrize("forms", [("full", "delta"), ("delta", "full"), ("full", "bf16")])
def test_a_checkpoint_of_another_format_becomes_the_teachers(forms):
    saved, held = forms
    p, q = (nn.Parameter(torch.ones(2)) for _ in "pq")
    opt = FusedScaledSGD([p], lr=0.1, ema_decay=0.75, ema_format=saved)
    teacher = torch.zeros(2, dtype=torch.float32 if held == "full" else torch.bfloat16)
    other = FusedScaledSGD([q], lr=0.1, ema_decay=0.75, ema=[teacher], ema_format=held)
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


def test_one_that_does_not_fit_is_refused():
    p = nn.Parameter(torch.zeros(2))
    far = torch.tensor([100.0, 1.0]).bfloat16()
    opt = FusedScaledSGD([p], ema_decay=0.5, ema=[far], ema_format="delta")
    with pytest.raises(ValueError, match=r"the teacher's tensor is up to 100 from the weights"):
        opt.step()
    assert torch.equal(far, torch.tensor([100.0, 1.0]).bfloat16())
    model = nn.Linear(4, 3)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=r"ema: .*ema_format='delta': torch\.bfloat16"):
            FusedScaledSGD(
                model.parameters(),
                ema_decay=0.5,
                ema=copy.deepcopy(model).to(dtype),
                ema_format="delta",
            )
    groups = [
        {"params": [p], "ema_format": f}
        for p, f in zip(model.parameters(), ("delta", "bf16"), strict=True)
    ]
    with pytest.raises(ValueError, match="allowed: the same in all groups"):
        FusedScaledSGD(groups, ema_decay=0.5, ema=copy.deepcopy(model).bfloat16(), model=model)


def test_its_buffers_are_averaged_in_full_or_not_at_all():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    teacher = copy.deepcopy(model).bfloat16()
    options = {"ema_decay": 0.9, "ema_format": "delta", "model": model}
    with pytest.raises(ValueError, match=r"ema_buffers='average': .*running_mean.*bfloat16"):
        FusedScaledSGD(model.parameters(), ema=teacher, ema_buffers="average", **options)
    FusedScaledSGD(model.parameters(), ema=teacher, ema_buffers="copy", **options)
    for name in ("running_mean", "running_var"):
        setattr(teacher[1], name, getattr(teacher[1], name).float())
    FusedScaledSGD(model.parameters(), ema=teacher, ema_buffers="average", **options)
