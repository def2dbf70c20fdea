"""The pass over gradients: their sum of squares, what a step makes of them, whose step that is."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from shim_backend import CHUNK_BYTES
from tolerances import COMPUTE_OF, NORM, UNIT
from torch import nn

import fused_ema
from fused_ema.optim.stepping import Begun
from fused_ema.step.gradients import Control, Ending, Treatment

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = ([], [0], [0, 0, 1], [1, 7, 0, 4096, 4097, 3 * 4096 + 5])


def parameters(sizes, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]


def give_gradients(params, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.dtype)


def exact(params) -> float:
    """In float64, by numpy, one tensor after the other."""
    grads = [p.grad.double().numpy() for p in params if p.grad is not None]
    return math.sqrt(sum(float(np.square(grad).sum()) for grad in grads))


def sgd(params, backend, **options):
    return fused_ema.FusedScaledSGD([{"params": params}], lr=1.0, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} tensors")
def test_the_norm_is_that_of_float64(sizes, dtype, backend):
    params = parameters(sizes, dtype)
    opt = sgd(params, backend, max_grad_norm=INF)
    give_gradients(params)
    for _ in range(2):
        opt.step()
        wanted = pytest.approx(exact(params), rel=NORM * UNIT[COMPUTE_OF[dtype]], abs=0.0)
        assert float(opt.grad_norm) == wanted
        assert opt.grad_norm.dtype == torch.float64
        if params:
            params[-1].grad = None


def test_one_norm_over_buckets_of_all_dtypes(backend):
    params = [p for dtype in DTYPES for p in parameters([5000, 3], dtype)]
    opt = sgd(params, backend, max_grad_norm=INF)
    give_gradients(params)
    opt.step()
    assert len(opt.backends) == len(DTYPES)
    assert float(opt.grad_norm) == pytest.approx(exact(params), rel=NORM * UNIT[torch.float32])


def test_sums_may_be_combined_in_between(backend):
    """As they are where gradients are on several devices, or in several processes."""
    params = [p for dtype in DTYPES for p in parameters([5000, 3], dtype)]
    opt = sgd(params, backend, max_grad_norm=2.0)
    opt.grad_scale = torch.tensor(4.0)
    for p in params:
        p.grad = torch.ones_like(p)
    for apart in (False, True):
        opt.step()
        assert float(opt.grad_norm) == math.sqrt(4 * 5003) / 4
        opt._stepper.latest._apart = not apart
    moved = 1.0 / 4 * 2.0 / (math.sqrt(4 * 5003) / 4 + 1e-6)
    for p in params[:4]:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1.0 - 2 * moved))


@pytest.mark.parametrize("sizes", SIZES[:3], ids=lambda sizes: f"{len(sizes)} tensors")
def test_no_gradients_are_finite_and_have_no_norm(sizes, backend):
    params = parameters(sizes)
    opt = sgd(params, backend, max_grad_norm=1.0, ema_decay=0.5)
    for _ in range(2):
        opt.step()
        assert opt.check_gradients() == 0.0
        assert opt.grad_norm == 0.0


SQUARES = (0.0, 2.25, 1e-300, INF, NAN)
SCALES = (None, 64.0, torch.tensor(3.0), torch.tensor(0.1, dtype=torch.float64))
FOUND = (None, torch.tensor(0.0), torch.tensor(2.0), torch.tensor(NAN, dtype=torch.float64))
LIMITS = (None, 0.0, 0.1, INF, torch.tensor(0.1, dtype=torch.float64))


def words(squares: float, treatment: Treatment) -> list[float]:
    """The formulas in numpy's float64."""
    given = (1.0 if treatment.scale is None else treatment.scale, treatment.found_inf or 0.0)
    scale, found_inf = map(np.float64, given)
    with np.errstate(all="ignore"):
        factor = 1.0 / scale
        norm = np.sqrt(np.float64(squares)) * factor
        if treatment.max_norm is not None:
            ratio = np.float64(treatment.max_norm) / (norm + 1e-6)
            factor = np.minimum(ratio, 1.0) * factor  # NaN where the ratio is
    skipped = found_inf != 0.0 or (treatment.checked and not math.isfinite(squares))
    return [factor, float(skipped), norm, 1.0 - skipped, squares]


def test_what_is_decided_has_the_same_bits_everywhere(backend):
    params = parameters([3])
    opt = sgd(params, backend)
    give_gradients(params)
    opt.step()
    (plan,) = opt._stepper.plans
    for squares, *fields in product(SQUARES, SCALES, FOUND, LIMITS, (False, True)):
        treatment = Treatment(*fields)
        parts = torch.tensor([squares, 0.0], dtype=torch.float64)
        ending = Ending.of(treatment, parts)
        plan.norm(None, ending)
        wanted = words(squares, treatment)
        np.testing.assert_array_equal(ending.control[:5].numpy(), wanted, str(treatment))
        assert Control(ending.control, True).found_inf == wanted[1]


@pytest.fixture
def few_programs(device_backend, monkeypatch):
    """Several chunks for each of Triton's programs."""
    if device_backend == "triton":
        from fused_ema.kernels import squares

        monkeypatch.setattr(squares, "PROGRAMS", 3)


def parts_of(opt) -> torch.Tensor:
    (plan,) = opt._prepared(Begun()).plans
    part = torch.full((plan.num_sums,), NAN, dtype=torch.float64)
    plan.norm(part, None)
    opt._stepper.release()
    return part


def test_chunks_are_read_from_the_last_to_the_first(device_backend):
    """So that a step, which reads them upwards, finds the first ones in the cache."""
    elements = (CHUNK_BYTES if device_backend == "shim" else 16384) // 4
    (p,) = params = parameters([5 * elements])
    opt = sgd(params, device_backend)
    p.grad = torch.arange(5).repeat_interleave(elements).float()
    opt.step()
    assert parts_of(opt).tolist() == [elements * k * k for k in (4, 3, 2, 1, 0)]


@pytest.mark.usefixtures("few_programs")
def test_sums_of_several_chunks_have_the_same_bits_at_every_pass(device_backend):
    params = parameters([7, 20 * 4096 + 5, 0, 4097])
    opt = sgd(params, device_backend, max_grad_norm=INF)
    norms = set()
    for _ in range(3):
        give_gradients(params)
        opt.step()
        norms.add(float(opt.grad_norm))
    (norm,) = norms
    assert norm == pytest.approx(exact(params), rel=NORM * UNIT[torch.float32], abs=0.0)


def test_more_chunks_than_blocks(request):
    """The CUDA kernel, which the tests' own build runs on the CPU, sums all chunks."""
    if "shim" not in request.config.getoption("--backends"):
        pytest.skip("needs the build of make test-shim")
    elements = CHUNK_BYTES // 8
    params = parameters([1030 * elements + 3], torch.float64)
    opt = sgd(params, "shim", max_grad_norm=INF)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    assert float(opt.grad_norm) == math.sqrt(1030 * elements + 3)
    parts = parts_of(opt)
    # the blocks that begin with the last chunks come to the first ones, too
    assert parts.tolist() == [elements + 3.0] + [2.0 * elements] * 6 + [1.0 * elements] * (1024 - 7)


def test_a_check_is_of_no_use_to_a_later_step(backend):
    p = nn.Parameter(torch.zeros(3))
    opt = sgd([p], backend, ema_decay=0.5, max_grad_norm=10.0)
    p.grad = torch.full((3,), NAN)
    assert opt.check_gradients() == 1.0
    opt.zero_grad()
    p.grad = torch.full((3,), 0.1)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.1))
    torch.testing.assert_close(opt.state[p]["ema"], torch.full((3,), -0.05))
    assert float(opt.grad_norm) == pytest.approx(0.1 * 3**0.5)


def test_a_norm_is_of_no_use_to_a_later_step(backend):
    p = nn.Parameter(torch.zeros(4))
    opt = sgd([p], backend, max_grad_norm=1.0)
    p.grad = torch.full((4,), 100.0)
    assert opt.check_gradients() == 0.0
    p.grad.fill_(0.25)
    opt.step()
    assert float(opt.grad_norm) == 0.5
    assert torch.equal(p.detach(), torch.full((4,), -0.25))


CHANGES = {
    "write": lambda p: p.grad.mul_(0.01) is None,
    "replace": lambda p: setattr(p, "grad", p.grad * 0.01),
    "data": lambda p: setattr(p.grad, "data", p.grad * 0.01),
    "drop": lambda p: setattr(p, "grad", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_scaler_found_out_is_of_no_use_to_other_gradients(change, backend):
    params, others = parameters([3, 4]), parameters([3, 4])
    options = {"max_grad_norm": 1.0, "ema_decay": 0.5}
    opt, twin = sgd(params, backend, **options), sgd(others, "reference", **options)
    scaler = fused_ema.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    opt.register_step_pre_hook(lambda *_: change(params[1]) or None)
    twin.grad_scale = torch.tensor(4.0)
    for _ in range(2):
        give_gradients(params, 8.0)
        give_gradients(others, 8.0)
        scaler.step(opt)
        scaler.update()
        change(others[1])
        twin.step()
        torch.testing.assert_close(opt.grad_norm, twin.grad_norm, rtol=1e-6, atol=0.0)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p.detach(), q.detach())
            torch.testing.assert_close(opt.state[p]["ema"], twin.state[q]["ema"])


def test_what_a_scaler_found_out_goes_with_its_step(backend):
    (p,) = params = parameters([3])
    opt = sgd(params, backend, max_grad_norm=1.0)
    scaler = fused_ema.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    handle = opt.register_step_pre_hook(lambda *_: 1 / 0)
    p.grad = torch.full((3,), 100.0)
    with pytest.raises(ZeroDivisionError):
        scaler.step(opt)
    handle.remove()
    p.grad.fill_(0.1)
    opt.step()
    assert float(opt.grad_norm) == pytest.approx(0.1 * 3**0.5)
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


def test_max_grad_norm_may_be_a_tensor_on_the_device(backend):
    (p,) = params = parameters([4])
    opt = sgd(params, backend, max_grad_norm=torch.tensor(2.0))
    p.grad = torch.full((4,), 4.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.0))
    opt.param_groups[0]["max_grad_norm"].fill_(4.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), -2.0))
