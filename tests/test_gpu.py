"""What only a GPU can show: launches, streams, synchronisation, CUDA graphs; else skipped."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import twins
from cases import FEW, by_name
from harness import build, make_problem
from optimizers import each_optimizer
from torch.profiler import ProfilerActivity, profile
from twins import set_gradients

import fused_ema
from fused_ema.ema.decay import CosineDecay

KERNELS = ("native", "triton")
SHAPES = ((), (0,), (7,), (300, 41), (70_001,))


parameters = partial(twins.parameters, SHAPES, torch.float32, "cuda")
on_cpu = partial(twins.parameters, SHAPES, torch.float32, "cpu")
assert_same = partial(twins.assert_same, rtol=2e-6, atol=1e-6)


def launched(step) -> list[str]:
    """Names of the kernels that `step` launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    return [event.name for event in events if not event.name.startswith(("Memcpy", "Memset"))]


@pytest.fixture(autouse=True)
def on_a_gpu(pytestconfig):
    if not pytestconfig.getoption("--device").startswith("cuda"):
        pytest.skip("needs a CUDA GPU and --device=cuda:0: on the CPU Triton is interpreted")


@pytest.mark.parametrize("kernels", KERNELS)
def test_one_launch_a_bucket(kernels):
    groups = [{"params": parameters(seed=k), "lr": 1e-3 * (k + 1)} for k in range(5)]
    opt = fused_ema.FusedScaledAdamW(groups, ema_decay=0.99, kappa=2.0, backend=kernels)
    params = [p for group in opt.param_groups for p in group["params"]]
    for step in range(3):
        set_gradients(step, params)
        opt.step()
    set_gradients(3, params)
    assert len(launched(opt.step)) == 1


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_does_not_wait_for_the_device(kernels, scaled, capturable):
    params = parameters()
    decays = (0.9, CosineDecay(0.5, 20))
    if capturable:
        decays = (torch.tensor(0.9, device="cuda"), *decays[1:])
    opt = fused_ema.FusedScaledAdamW(
        params, ema_decay=decays, backend=kernels, capturable=capturable
    )
    if scaled:
        opt.grad_scale, opt.found_inf = (torch.ones((), device="cuda") * k for k in (8.0, 0.0))
    set_gradients(0, params)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", KERNELS)
def test_streams_and_fresh_gradients(kernels):
    params, others = parameters(), on_cpu()
    opt = fused_ema.FusedScaledAdamW(params, ema_decay=0.9, kappa=3.0, backend=kernels)
    twin = fused_ema.FusedScaledAdamW(others, ema_decay=0.9, kappa=3.0, backend="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(6):
            set_gradients(step, others, params)
            opt.step()
            twin.step()
            opt.zero_grad(set_to_none=True)
    stream.synchronize()
    assert_same(opt, twin)


def test_a_cpu_and_a_gpu_in_one_optimizer():
    mixed = [*parameters(), *on_cpu(seed=1)]
    others = [*on_cpu(), *on_cpu(seed=1)]
    opt = fused_ema.FusedScaledSGD(mixed, 1e-2, momentum=0.9, ema_decay=0.9)
    twin = fused_ema.FusedScaledSGD(others, 1e-2, momentum=0.9, ema_decay=0.9, backend="reference")
    for step in range(3):
        set_gradients(step, others, mixed)
        opt.step()
        twin.step()
    assert opt.backends[1] == "native"
    assert_same(opt, twin)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kernels", KERNELS)
def test_two_gpus_in_one_optimizer(kernels):
    params = [
        *twins.parameters(SHAPES, torch.float32, "cuda:0"),
        *twins.parameters(SHAPES, torch.float32, "cuda:1", seed=1),
    ]
    others = [*on_cpu(), *on_cpu(seed=1)]
    opt = fused_ema.FusedScaledAdam(params, ema_decay=0.9, backend=kernels)
    twin = fused_ema.FusedScaledAdam(others, ema_decay=0.9, backend="reference")
    for step in range(3):
        set_gradients(step, others, params)
        opt.step()
        twin.step()
    assert_same(opt, twin)


@each_optimizer
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_replayed_graph_goes_on(kernels, optimizer):
    """Step counts, schedules and tensor hyper-parameters move while Python stands still."""
    cls, decays = optimizer.ours, (0.9, CosineDecay(0.5, total=40.0))
    options = {**optimizer.options, "ema_decay": decays}
    params, others = parameters(), on_cpu()
    lr = torch.tensor(1e-2, device="cuda", dtype=torch.float64)
    kappa = torch.tensor(2.0, device="cuda", dtype=torch.float64)
    opt = cls(params, lr, kappa=kappa, capturable=True, backend=kernels, **options)
    twin = cls(others, 1e-2, kappa=2.0, backend="reference", **options)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    for step in range(8):
        if step == 5:
            lr.fill_(3e-2)
            opt.kappa = 4.0
            twin.param_groups[0]["lr"], twin.kappa = 3e-2, 4.0
        set_gradients(step, others, params)
        twin.step()
        if step < 2:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                opt.step()
            torch.cuda.current_stream().wait_stream(stream)
        if step == 2:
            with torch.cuda.graph(graph):
                opt.step()
        if step >= 2:
            graph.replay()
    assert_same(opt, twin)
    # and without the graph
    set_gradients(9, others, params)
    twin.step()
    opt.step()
    assert_same(opt, twin)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_hundred_replays_are_a_hundred_steps(kernels):
    params, others = parameters(), parameters()
    lr, kappa = (torch.tensor(v, device="cuda", dtype=torch.float64) for v in (1e-2, 2.0))
    opt, twin = (
        fused_ema.FusedScaledAdamW(
            p, lr, kappa=kappa, ema_decay=0.99, capturable=True, backend=kernels
        )
        for p in (params, others)
    )
    set_gradients(0, params, others)
    opt.step()
    twin.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for step in range(100):
        lr.fill_(1e-2 / (1 + step))
        kappa.fill_(1.0 + step % 3)
        set_gradients(step, params, others)
        graph.replay()
        twin.step()
    twins.assert_same(opt, twin, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_capture_needs_capturable(kernels):
    params = parameters()
    opt = fused_ema.FusedScaledAdamW(params, backend=kernels)
    set_gradients(0, params)
    opt.step()
    with (
        pytest.raises(RuntimeError, match="capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        opt.step()


def test_kernels_agree_bit_for_bit(monkeypatch):
    """No contraction, IEEE division and roots: the device gives the CPU's bits."""
    case = by_name("AdamW-triple")
    results = []
    for device, kernels in (("cpu", "native"), ("cuda", "native"), ("cuda", "triton")):
        monkeypatch.setattr("harness.DEVICE", torch.device(device))
        problem = make_problem(case, FEW, [torch.float32, torch.bfloat16], 5)
        opt = build(fused_ema.FusedScaledAdamW, case, problem, backend=kernels)
        for step in range(5):
            problem.set_gradients(step)
            opt.step()
        params = [p for group in opt.param_groups for p in group["params"]]
        results.append([t.cpu() for p in params for t in (p.detach(), *opt.state[p].values())])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_scaler_skips_and_clips_as_on_the_cpu(kernels, capturable):
    params, others = parameters(), on_cpu()
    options = {"ema_decay": 0.9, "max_grad_norm": 1.0, "kappa": 2.0, "fused": True}
    opt = fused_ema.FusedScaledAdamW(params, backend=kernels, capturable=capturable, **options)
    twin = fused_ema.FusedScaledAdamW(others, backend="reference", **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    for step in range(4):
        set_gradients(step, others, params)
        for p in params:
            p.grad.mul_(scaler.get_scale())
        if step == 2:
            params[-1].grad[0] = float("inf")
        else:
            twin.step()
        scaler.step(opt)
        scaler.update()
    assert_same(opt, twin)
    torch.testing.assert_close(opt.grad_norm.cpu(), twin.grad_norm, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kernels", KERNELS)
def test_masters_are_a_float32_run(kernels):
    params = twins.parameters(SHAPES, torch.bfloat16, "cuda")
    floats = [torch.nn.Parameter(p.detach().float()) for p in params]
    opt, twin = (
        fused_ema.FusedScaledAdamW(p, ema_decay=0.9, master_weights=True, backend=kernels)
        for p in (params, floats)
    )
    for step in range(3):
        set_gradients(step, params)
        for p, q in zip(params, floats, strict=True):
            q.grad = p.grad.float()
        opt.step()
        twin.step()
    for p, q in zip(params, floats, strict=True):
        assert torch.equal(opt.state[p]["master"], q)
        assert torch.equal(p, q.to(torch.bfloat16))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("form", ["bf16", "delta"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_16_bits_are_rounded_as_on_the_cpu(kernels, form, capturable):
    """The same random bits; capturable groups make their seed on the device."""
    params, others = parameters(), on_cpu()
    teacher, theirs = (
        [p.detach().bfloat16() for p in own] if form == "bf16" else None for own in (params, others)
    )
    options = {"ema_decay": (0.9, 0.99), "ema_format": form, "state_format": "bf16", "kappa": 2.0}
    opt = fused_ema.FusedScaledAdamW(
        params, teacher=teacher, backend=kernels, capturable=capturable, **options
    )
    twin = fused_ema.FusedScaledAdamW(others, teacher=theirs, backend="native", **options)
    for step in range(3):
        set_gradients(step, others, params)
        opt.step()
        twin.step()
    for p, q in zip(params, others, strict=True):
        for key in ("exp_avg", "exp_avg_sq", "ema", "ema_1"):
            found, expected = opt.state[p][key].cpu(), twin.state[q][key]
            assert found.dtype == expected.dtype
            # folded on the device, a scalar may differ in its last bit, and a rounding with it
            differing = int((found != expected).sum())
            assert differing <= (0.01 * found.numel() if capturable else 0), key
    if teacher is not None:
        assert all(opt.state[p]["ema"] is t for p, t in zip(params, teacher, strict=True))
