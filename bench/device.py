"""The devices: they time a step, count its launches, and say what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from .machine import of_gpu

Step = Callable[[], object]

MILLI = 1e-3


@dataclass(frozen=True)
class Seconds:
    """The times of a step.

    elapsed: from the call on an idle device until the device has finished the step.
    host: until the call returns; None if the call does all the work.
    device: the device's part alone; None if the call does all the work.
    """

    elapsed: float
    host: float | None = None
    device: float | None = None

    @property
    def busy(self) -> float:
        """Time in which the device moves bytes."""
        return self.elapsed if self.device is None else self.device

    @property
    def host_alone(self) -> Seconds:
        return Seconds(self.elapsed if self.host is None else self.host)


@dataclass(frozen=True)
class Launches:
    """The launches of a step: kernels, and copies or fills of memory."""

    kernels: int
    copies: int


class Device(Protocol):
    """A kind of device.

    torch_device: torch's name of the device.
    memory: bytes that providers timed in turns may hold together.
    host_elements: elements of each tensor in measurements of the host's cost, only enough to have
    something to launch.
    """

    torch_device: torch.device
    memory: float
    host_elements: int

    def time(self, prepare: Step, step: Step, count: int) -> Seconds:
        """Medians of ``count`` steps; ``prepare`` runs before each and is not timed."""

    def launches(self, step: Step) -> Launches | None:
        """Take a step; return its launches, or None if they are not known."""

    def peak_memory(self, step: Step) -> int:
        """Take a step; return the most bytes that it holds in addition to those held before it."""

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""

    def describe(self) -> dict[str, object]: ...


class Cpu:
    """The processor; a step is done when its call returns."""

    torch_device = torch.device("cpu")
    memory = 10e9
    host_elements = 0

    def time(self, prepare: Step, step: Step, count: int) -> Seconds:
        return Seconds(median(self._once(prepare, step) for _ in range(count)))

    def _once(self, prepare: Step, step: Step) -> float:
        prepare()
        start = perf_counter()
        step()
        return perf_counter() - start

    def launches(self, step: Step) -> Launches | None:
        step()
        return None

    def peak_memory(self, step: Step) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        held = accumulate(size for _, size in sorted(changes, key=itemgetter(0)))
        return max(0, *held, 0)

    def synchronize(self) -> None:
        """Do nothing: a call's work is done when it returns."""

    def describe(self) -> dict[str, object]:
        return {"device": "cpu", "driver": None}


class Cuda:
    """An NVIDIA GPU; the host only queues the launches of a step.

    Events around a step time it in two ways. On an idle device it takes at least as long as the
    host's part. Behind a kernel that only waits, the host has queued the whole step (as far as it
    fits: about 1000 launches) before the device reaches it, and gaps do not count.
    """

    torch_device = torch.device("cuda")
    host_elements = 1

    # The waiting kernel takes this many times the host's time for a step, at a clock rate that no
    # GPU exceeds by much; slower GPUs wait longer.
    MARGIN = 1.5
    CLOCK_RATE = 2e9

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA GPU here")
        self.memory = 0.8 * torch.cuda.mem_get_info()[0]
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, prepare: Step, step: Step, count: int) -> Seconds:
        idle = [self._idle(prepare, step) for _ in range(count)]
        elapsed, host = (median(values) for values in zip(*idle, strict=True))
        device = median(self._queued(prepare, step, host) for _ in range(count))
        return Seconds(elapsed, host, device)

    def _idle(self, prepare: Step, step: Step) -> tuple[float, float]:
        prepare()
        torch.cuda.synchronize()
        self._begin.record()
        start = perf_counter()
        step()
        host = perf_counter() - start
        return self._elapsed(), host

    def _queued(self, prepare: Step, step: Step, host: float) -> float:
        prepare()
        torch.cuda._sleep(int(self.MARGIN * host * self.CLOCK_RATE))
        self._begin.record()
        step()
        return self._elapsed()

    def _elapsed(self) -> float:
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * MILLI

    def launches(self, step: Step) -> Launches | None:
        # One more kernel, so that a profiler that sees nothing can be told from a step without
        # launches.
        known = torch.zeros(1, device=self.torch_device)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            known.add_(1)
            step()
            torch.cuda.synchronize()
        names = [event.name for event in recorded.events() if is_device_work(event)]
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
        kernels = len(names) - copies - 1
        return None if kernels < 0 else Launches(kernels, copies)

    def peak_memory(self, step: Step) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def describe(self) -> dict[str, object]:
        return {
            "device": torch.cuda.get_device_name(),
            "driver": of_gpu("driver_version") or "unknown",
        }


def is_device_work(event: Any) -> bool:
    return event.device_type.name == "CUDA" and not event.is_user_annotation


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda}
