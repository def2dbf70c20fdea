"""Steps with Triton's compiled kernels on a driver that launches nothing, and tells what it saw.

python tests/triton_launch_worker.py    a line of JSON
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch.profiler import ProfilerActivity, profile
from triton.backends.compiler import GPUTarget

from fused_ema import CosineDecay, FusedScaledAdamW, FusedScaledSGD
from fused_ema.kernels.fold import fold_kernel
from fused_ema.kernels.squares import squares_kernel
from fused_ema.kernels.step import step_kernel
from fused_ema.step.backends import triton as backend

STEPS = 4


class Utils:
    """What a driver knows of its device, in which a binary is a name."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}

    def load_binary(self, name: str, *of: Any) -> tuple[str, str, int, int, int]:
        return name, name, 0, 0, 1024

    def unload_module(self, module: str) -> None:
        pass


class Driver:
    """Launches nothing; `launches` are kernel, programs, stream and pointers of each."""

    def __init__(self) -> None:
        self.utils = Utils()
        self.stream = 0
        self.launches: list[tuple[str, int, int, list[int]]] = []
        self.hooks: list[Any] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: str, *more: Any) -> None:
            _, _, enter, _, *arguments = more
            pointers = [a.data_ptr() for a in arguments if isinstance(a, torch.Tensor)]
            self.launches.append((function, x * y * z, stream, pointers))
            self.hooks.append(enter)

        return launch


class Dispatches:
    """Counts what Triton's dispatch is asked for."""

    def __init__(self, *kernels: Any) -> None:
        self.count = 0
        for kernel in kernels:
            kernel.run = self.counted(kernel.run)

    def counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return run(*args, **kwargs)

        return counted


def parameters() -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


@contextmanager
def operators(found: list[list[str]]) -> Iterator[None]:
    """Adds the names of torch's operators that run."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    found.append([event.name for event in seen.events() if event.name.startswith("aten::")])


def steps(driver: Driver, dispatches: Dispatches, opt: torch.optim.Optimizer) -> dict[str, Any]:
    """What each of a few steps with unchanged gradients did."""
    driver.launches.clear()
    before = dispatches.count
    counts, ran = [], []
    for _ in range(STEPS):
        with operators(ran):
            opt.step()
        counts.append(dispatches.count - before)
    return {"dispatches": counts, "launches": list(driver.launches), "operators": ran}


def main() -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    backend.unsupported = lambda bucket: None
    dispatches = Dispatches(step_kernel, squares_kernel, fold_kernel)
    result: dict[str, Any] = {}
    sgd = FusedScaledSGD(parameters(), 0.1, ema_decay=0.9, backend="triton")
    result["sgd"] = steps(driver, dispatches, sgd)
    clipped = FusedScaledAdamW(parameters(), ema_decay=0.9, max_grad_norm=1.0, backend="triton")
    result["clipped"] = steps(driver, dispatches, clipped)
    options = {"ema_decay": (0.9, CosineDecay(0.5, 9.0)), "capturable": True, "backend": "triton"}
    capturable = FusedScaledAdamW(parameters(), torch.tensor(1e-3), **options)
    result["capturable"] = steps(driver, dispatches, capturable)

    driver.stream = 7
    triton.knobs.runtime.launch_enter_hook = print
    sgd.step()
    result["stream"] = driver.launches[-1][2]
    result["hooked"] = driver.hooks[-1] is triton.knobs.runtime.launch_enter_hook
    print(json.dumps(result))


if __name__ == "__main__":
    main()
