"""Times providers in turns (A B C, C A B, ...), so that a machine's noise affects them alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from statistics import median, quantiles
from time import monotonic, perf_counter

import torch

from .cases import Case
from .check import Checker, Verdict
from .data import Data, Running
from .device import Device, Seconds
from .provider import Provider
from .providers import PREFERRED
from .spec import Spec
from .streams import READ

# Factors of the drawn gradients, so that no two steps get the same.
FACTORS = (0.5, 1.5)

# Arrays of a parameter's size besides the providers' own: the drawn weights and gradients, the new
# gradients, and a step's temporaries.
SHARED_ARRAYS = 2 + 1 + 4

# Enough rounds for a median, however little time there is.
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Settings:
    """The length of the measurements.

    rounds: the largest number of turns of every provider.
    seconds: time for all of them, after which there are no more than :data:`LEAST_ROUNDS`.
    round_seconds: time of a turn, which repeats short steps.
    warmup_seconds: time for which every provider steps before it is timed.
    names: the providers to time, None for all; bounds are always timed.
    """

    rounds: int = 30
    seconds: float = inf
    round_seconds: float = 0.02
    warmup_seconds: float = 0.2
    seed: int = 0
    names: Sequence[str] | None = None

    def wanted(self, providers: Sequence[Provider]) -> list[Provider]:
        return [p for p in providers if self.names is None or p.bound or p.name in self.names]


@dataclass
class Result:
    """A provider's seconds per step, one for each round, or the verdict why there are none.

    baseline: the provider with which its times are compared, if there is one.
    against_baseline: its time over the baseline's, round by round.
    against_bound: its bandwidth over the bound's, round by round.
    """

    case: Case
    spec: Spec
    provider: Provider
    verdict: Verdict
    baseline: Provider | None = None
    seconds: list[Seconds] = field(default_factory=list)
    against_baseline: list[float] = field(default_factory=list)
    against_bound: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self._elapsed)

    @property
    def p10(self) -> float:
        return deciles(self._elapsed)[0]

    @property
    def p90(self) -> float:
        return deciles(self._elapsed)[-1]

    @property
    def host(self) -> float | None:
        """The host's time, if it is not the whole time."""
        return median_of([s.host for s in self.seconds if s.host is not None])

    @property
    def device(self) -> float | None:
        """The device's time, if there is a device."""
        return median_of([s.device for s in self.seconds if s.device is not None])

    @property
    def bandwidth(self) -> float:
        """Counted bytes per second."""
        return self.num_bytes / median(s.busy for s in self.seconds)

    @property
    def bytes_per_param(self) -> int:
        bound = self.provider.bound
        return bound.arrays * torch.float32.itemsize if bound else self.spec.bytes_per_param

    @property
    def numel(self) -> int:
        bound = self.provider.bound
        return self.case.numel if bound is None or bound.numel is None else bound.numel

    @property
    def num_bytes(self) -> int:
        return self.bytes_per_param * self.numel

    @property
    def _elapsed(self) -> list[float]:
        return [s.elapsed for s in self.seconds]


def deciles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=10, method="inclusive") if len(values) > 1 else list(values)


def median_of(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def measure(
    case: Case, spec: Spec, providers: Sequence[Provider], device: Device, settings: Settings
) -> list[Result]:
    """Check every provider, then time the correct ones; one result each, in the given order."""
    start = monotonic()
    providers = settings.wanted(providers)
    data = Data.draw(case, spec.scenario.dtype, device, settings.seed)
    checker = Checker(spec, data, device)
    results = {
        provider: Result(case, spec, provider, checker.check(provider)) for provider in providers
    }
    del checker  # frees its tensors for the providers
    right = [provider for provider, result in results.items() if result.verdict.is_right]
    baseline = next((provider for provider in PREFERRED if provider in right), None)
    for result in results.values():
        result.baseline = baseline
    shared = [provider for provider in right if provider is baseline or provider.bound]
    groups = list(memory_groups(right, shared, case, spec, device.memory))
    for i, group in enumerate(groups, start=1):
        deadline = start + settings.seconds * i / len(groups)
        time_group(group, spec, data, results, device, settings, deadline)
    return list(results.values())


def memory_groups(
    providers: Sequence[Provider],
    shared: Sequence[Provider],
    case: Case,
    spec: Spec,
    memory: float,
) -> Iterator[list[Provider]]:
    """Split providers into groups that fit in memory; the shared ones are in every group."""
    array = case.numel * torch.float32.itemsize
    others = [provider for provider in providers if provider not in shared]
    held = (max(spec.num_arrays, READ) - 1) * array
    room = (memory - SHARED_ARRAYS * array) // max(1, held)
    size = max(1, int(room) - len(shared))
    for start in range(0, max(1, len(others)), size):
        yield [*shared, *others[start : start + size]]


def time_group(
    group: Sequence[Provider],
    spec: Spec,
    data: Data,
    results: dict[Provider, Result],
    device: Device,
    settings: Settings,
    deadline: float,
) -> None:
    """Add the times and ratios of every round to the results."""
    order = random.Random(settings.seed)
    with no_collection():
        turns = [
            Turn(Running(provider, spec, data), data.case, device, settings) for provider in group
        ]
        for turn in turns:
            turn.warm_up()
        for count in range(settings.rounds):
            if count >= LEAST_ROUNDS and monotonic() > deadline:
                break
            order.shuffle(turns)
            seconds = {turn.provider: turn.seconds() for turn in turns}
            for provider, value in seconds.items():
                add_round(results, provider, value, seconds)


def add_round(
    results: dict[Provider, Result],
    provider: Provider,
    value: Seconds,
    seconds: dict[Provider, Seconds],
) -> None:
    result = results[provider]
    result.seconds.append(value)
    if result.baseline in seconds and result.numel == result.case.numel:
        result.against_baseline.append(value.elapsed / seconds[result.baseline].elapsed)
    for bound in (provider for provider in seconds if provider.bound):
        bandwidth = results[bound].num_bytes / seconds[bound].busy
        result.against_bound.append(result.num_bytes / value.busy / bandwidth)


class Turn:
    """A running provider, and the number of steps in one of its turns."""

    def __init__(self, running: Running, case: Case, device: Device, settings: Settings) -> None:
        self.provider = running.provider
        self._running = running
        self._case = case
        self._device = device
        self._settings = settings
        self._factors = random.Random(settings.seed)
        self._steps = 1

    def warm_up(self) -> None:
        self._prepare()
        start = perf_counter()
        steps = 0
        while steps == 0 or perf_counter() - start < self._settings.warmup_seconds:
            self._time(1)
            steps += 1
        per_step = (perf_counter() - start) / steps
        self._running.zero_grad()
        self._steps = max(1, int(self._settings.round_seconds / per_step))

    def seconds(self) -> Seconds:
        """Median time of this turn's steps; making the gradients is not counted."""
        if self._case.hot:
            self._prepare()
        spent = self._time(self._steps)
        self._running.zero_grad()
        return spent.host_alone if self._case.host_only else spent

    def _time(self, count: int) -> Seconds:
        prepare = nothing if self._case.hot else self._prepare
        return self._device.time(prepare, self._running.step, count)

    def _prepare(self) -> None:
        self._running.prepare(self._factors.uniform(*FACTORS))


def nothing() -> None:
    """Do nothing: the gradients stay."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from collecting for all providers in the time of one."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
