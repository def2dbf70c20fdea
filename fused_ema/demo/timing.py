"""Part 3: a quick measurement of a step's time. The careful measurements are in bench/."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from .. import FusedScaledAdamW
from .console import Progress, table
from .problem import network

Shape: TypeAlias = tuple[int, ...]

RHO = 0.999
OURS = "FusedScaledAdamW"
# arguments foreach and fused of torch's AdamW
PATHS = {
    "torch for-loop + lerp": (False, False),
    "torch foreach + lerp": (True, False),
    "torch fused + lerp": (False, True),
}
SECONDS_A_SAMPLE = 5e-3
SECONDS_A_NETWORK = 15
FEWEST_ROUNDS = 3
CROWDED = "cores were busy: do not trust"


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, for every contestant on one network, ``[rounds]`` each.

    ``others`` is the mean number of cores that other processes kept busy meanwhile.
    """

    network: str
    threads: int
    others: float
    tensors: int
    parameters: int
    seconds: dict[str, Tensor]

    def quantiles(self, name: str) -> tuple[float, float, float]:
        """10th percentile, median and 90th percentile."""
        marks = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        low, median, high = self.seconds[name].quantile(marks).tolist()
        return low, median, high

    def crowded(self) -> bool:
        """Whether threads had to wait for a core, which makes the times unreliable."""
        return self.others + self.threads > (os.cpu_count() or 1) + 0.25

    def ratio(self, name: str) -> float:
        """The contestant's median over ours."""
        return self.quantiles(name)[1] / self.quantiles(OURS)[1]


def resnet18_shapes(width: int = 64, classes: int = 10) -> list[Shape]:
    """Shapes of ResNet-18's 62 parameters with a 3x3 stem: 11.2 M elements at width 64."""
    shapes: list[Shape] = [*conv_and_norm(3, width, 3)]
    inputs = width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        for block in range(2):
            shapes += conv_and_norm(inputs, outputs, 3) + conv_and_norm(outputs, outputs, 3)
            if block == 0 and inputs != outputs:
                shapes += conv_and_norm(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, (classes, inputs), (classes,)]


def conv_and_norm(inputs: int, outputs: int, size: int) -> list[Shape]:
    """Shapes of a convolution without bias and its normalization's weight and bias."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def parameters(shapes: Sequence[Shape]) -> list[Tensor]:
    """Random parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def torch_step(shapes: Sequence[Shape], foreach: bool, fused: bool) -> Callable[[], None]:
    """A step of torch's AdamW and the fastest EMA that torch's operators allow."""
    params = parameters(shapes)
    averages = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, foreach=foreach, fused=fused)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, params, 1 - RHO)

    return step


def our_step(shapes: Sequence[Shape]) -> Callable[[], None]:
    """A step of FusedScaledAdamW."""
    return FusedScaledAdamW(parameters(shapes), ema_decay=RHO).step


def seconds_a_step(step: Callable[[], None], repeats: int) -> float:
    """Mean time of some steps in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def measure(name: str, shapes: Sequence[Shape], rounds: int, progress: Progress) -> Timing:
    """Time all contestants in turn, each on tensors of its own, in every round.

    If other work slows it down, it ends after fewer rounds.
    """
    steps = {path: torch_step(shapes, *flags) for path, flags in PATHS.items()}
    steps[OURS] = our_step(shapes)
    start, others = time.perf_counter(), others_cpu_seconds()
    repeats = {}
    for path, step in steps.items():
        step()  # creates the states
        repeats[path] = max(1, round(SECONDS_A_SAMPLE / seconds_a_step(step, 1)))
    samples: dict[str, list[float]] = {path: [] for path in steps}
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > SECONDS_A_NETWORK:
            break
        for path, step in steps.items():
            samples[path].append(seconds_a_step(step, repeats[path]))
        progress.advance(note=f"({name})")
    return Timing(
        network=name,
        threads=torch.get_num_threads(),
        others=(others_cpu_seconds() - others) / (time.perf_counter() - start),
        tensors=len(shapes),
        parameters=sum(torch.Size(shape).numel() for shape in shapes),
        seconds={path: torch.tensor(times).double() for path, times in samples.items()},
    )


def others_cpu_seconds() -> float:
    """Processor time of all other processes so far; 0 if the system does not tell it."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, *others = stat.read_text().split("\n")[0].split()[1:9]
    ticks = sum(map(int, (user, nice, system, *others)))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A context in which torch uses ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(rounds: int, width: int) -> list[Timing]:
    """Time a step on the demo's network, with one thread as in training, and on ResNet-18."""
    small = [tuple(param.shape) for param in network(seed=0).parameters()]
    with Progress("[3/3] Timing", 2 * rounds) as progress:
        with threads(1):
            first = measure("demo network", small, rounds, progress)
        return [first, measure("ResNet-18 shapes", resnet18_shapes(width), rounds, progress)]


def report(timings: Sequence[Timing]) -> str:
    """The table of part 3."""
    header = ["network", "threads", "step", "median", "p10 to p90", "ratio to ours"]
    rows = [row(timing, path) for timing in timings for path in timing.seconds]
    crowded = [timing.network for timing in timings if timing.crowded()]
    warning = f"\n   {' and '.join(crowded)}: {CROWDED}." if crowded else ""
    rounds = " and ".join(str(len(timing.seconds[OURS])) for timing in timings)
    return (
        f"3. Timing: AdamW + EMA, {rounds} interleaved rounds\n\n"
        f"{table('<><>>>', header, rows)}\n\n"
        "   lerp: torch._foreach_lerp_ for the EMA. This is a quick look; bench/ is the careful "
        f"one.{warning}"
    )


def row(timing: Timing, path: str) -> list[str]:
    """A row of the table: one contestant on one network."""
    low, median, high = (milliseconds(1e3 * value) for value in timing.quantiles(path))
    return [
        describe(timing),
        str(timing.threads),
        path,
        f"{median} ms",
        f"{low} to {high}",
        f"{timing.ratio(path):.2f}",
    ]


def describe(timing: Timing) -> str:
    """Name and size of a network."""
    size = timing.parameters
    count = f"{size / 1e6:.1f} M" if size >= 1e6 else f"{size / 1e3:.0f} k"
    return f"{timing.network} ({count} in {timing.tensors} tensors)"


def milliseconds(value: float) -> str:
    """The time in milliseconds with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
