"""How many launches a step takes on a GPU: the kernels' own, and torch's operators beside them."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import pytest
import torch
import twins
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import fused_ema
from fused_ema.extension import cuda
from fused_ema.step import stepper

SHAPES = ((7,), (5, 3), (4100,))
# These ask a device for nothing; copies are counted apart, which a GPU makes beside its kernels.
IDLE = ("empty", "empty_like", "empty_strided", "new_empty", "_pin_memory", "is_pinned", "detach")
MOVING = ("copy_", "_to_copy")


class Launches(TorchDispatchMode):
    """Counts them while it is entered: `norm`, `run`, copies, and the names of torch's operators.

    Each of a plan's two calls is one launch.
    """

    def __init__(self, opt, monkeypatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators: list[str] = []
        # kernels go on, which a mode would not see
        monkeypatch.setattr(stepper, "dispatch_modes", lambda: 0)
        for plan in opt._stepper.plans:
            for name in ("_launch", "_squares", "_trust"):
                # Triton's interpreter computes by operators
                if getattr(plan, name, None) is not None:
                    monkeypatch.setattr(plan, name, unseen(getattr(plan, name)))
        opt._stepper.latest.plans = [Watched(plan, self.found) for plan in opt._stepper.plans]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        views = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if name in MOVING:
            self.found["copy"] += 1
        elif not (views or name in IDLE or func._schema.name.startswith("profiler::")):
            self.operators.append(name)
        return func(*args, **(kwargs or {}))


def unseen(launch):
    def call(**arguments):
        with _disable_current_modes():
            return launch(**arguments)

    return call


class Watched:
    """A plan whose launches are counted."""

    def __init__(self, plan: Any, found: Counter[str]) -> None:
        self._plan, self._found = plan, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)

    def norm(self, *arguments: Any) -> None:
        self._found["norm"] += 1
        self._plan.norm(*arguments)

    def run(self, *arguments: Any) -> None:
        self._found["run"] += 1
        self._plan.run(*arguments)


def stepped(backend, dtypes=(torch.float32,), **options):
    """An optimizer after its first step, and its parameters."""
    params = [p for dtype in dtypes for p in twins.parameters(SHAPES, dtype)]
    opt = fused_ema.FusedScaledAdamW(params, ema_decay=0.9, backend=backend, **options)
    twins.set_gradients(0, params)
    opt.step()
    return opt, params


def launches(opt, monkeypatch, step) -> Counter[str]:
    """The launches of an optimizer's step, in which torch's operators launch nothing."""
    counter = Launches(opt, monkeypatch)
    with counter:
        step()
    assert counter.operators == []
    return counter.found


# The words of Triton's kernel, and what the host asks of a step that may be skipped.
def copies(backend, verdict: bool = False) -> int:
    return (backend == "triton") + verdict


@pytest.mark.parametrize("max_norm", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_clipping_takes_one_launch_more(max_norm, device_backend, monkeypatch):
    opt, _ = stepped(device_backend, max_grad_norm=max_norm)
    found = launches(opt, monkeypatch, opt.step)
    assert found == Counter(norm=1, run=1, copy=copies(device_backend))


def test_buckets_take_two_launches_each(device_backend, monkeypatch):
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    opt, _ = stepped(device_backend, dtypes, max_grad_norm=1.0)
    found = launches(opt, monkeypatch, opt.step)
    assert found == Counter(norm=3, run=3, copy=3 * copies(device_backend))


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("scale", [None, 8.0, torch.tensor(8.0)], ids=["none", "number", "tensor"])
def test_what_torchs_scaler_tells_takes_one_launch_more(
    scale, max_norm, device_backend, monkeypatch
):
    opt, _ = stepped(device_backend, max_grad_norm=max_norm)
    opt.grad_scale, opt.found_inf = scale, torch.tensor(0.0)
    found = launches(opt, monkeypatch, opt.step)
    assert found == Counter(norm=1, run=1, copy=copies(device_backend, verdict=True))


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_our_scaler_takes_two_launches_in_all(max_norm, device_backend, monkeypatch):
    opt, _ = stepped(device_backend, max_grad_norm=max_norm)
    scaler = fused_ema.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    found = launches(opt, monkeypatch, lambda: scaler.step(opt))
    assert found == Counter(norm=1, run=1, copy=copies(device_backend, verdict=True))
    scaler.update()


def test_a_check_takes_one_launch(device_backend, monkeypatch):
    opt, _ = stepped(device_backend)
    found = launches(opt, monkeypatch, opt.check_gradients)
    assert found == Counter(norm=1, copy=copies(device_backend))


def test_a_plain_step_takes_one_launch(device_backend, monkeypatch):
    opt, _ = stepped(device_backend)
    found = launches(opt, monkeypatch, opt.step)
    assert found == Counter(run=1, copy=copies(device_backend))


def num_kernels(backend, monkeypatch, step) -> int:
    """How many kernels a step launches."""
    if backend == "shim":
        shim = ctypes.CDLL(cuda.__file__)
        before = shim.shim_num_launches()
        step()
        return shim.shim_num_launches() - before
    from fused_ema.kernels.launching import Launch

    launched = []
    run = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda *given: launched.append(run(*given)))
    step()
    return len(launched)


@pytest.mark.parametrize("cls", [fused_ema.FusedScaledLARS, fused_ema.FusedScaledLAMB])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 2),
        ({"max_grad_norm": 1.0}, 3),
        ({"capturable": True}, 3),
        ({"max_grad_norm": 1.0, "capturable": True}, 4),
    ],
    ids=["plain", "clip", "capturable", "capturable-clip"],
)
def test_trust_ratios_take_one_launch_more(options, expected, cls, device_backend, monkeypatch):
    """Whatever the number of tensors and groups."""
    params = twins.parameters(SHAPES, torch.float32)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1, "adapt": False}]
    opt = cls(groups, ema_decay=0.9, backend=device_backend, **options)
    twins.set_gradients(0, params)
    opt.step()
    assert num_kernels(device_backend, monkeypatch, opt.step) == expected
