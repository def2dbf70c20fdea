"""Times providers in turns: A B C, C A B, ... so that a machine's moods hit them all alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter

from .cases import Case
from .check import Checker
from .data import Data, Running
from .providers import BASELINE, BOUND, Provider, Spec
from .streams import READ

# Gradients are the drawn ones times a factor: no two steps get the same.
FACTORS = (0.5, 1.5)

# Arrays of a parameter's size that exist at once besides the providers' own: the drawn weights and
# gradients, the new gradients, and a step's temporaries.
SHARED_ARRAYS = 2 + 1 + 4


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    rounds: turns of every provider.
    round_seconds: time that a turn takes, by repeating short steps.
    warmup_seconds: time that every provider steps before it counts.
    memory: bytes that providers timed in turns may hold together; more of them take turns in
        groups, each with the baseline and the bound.
    """

    rounds: int = 30
    round_seconds: float = 0.02
    warmup_seconds: float = 0.2
    memory: float = 10e9
    seed: int = 0


@dataclass
class Result:
    """A provider's seconds per step, one of each round, or why there are none.

    bytes_per_param: what a step must read and write, counted.
    num_operators: torch operators called by a step.
    against_baseline: its time over the baseline's, round by round.
    against_bound: its bandwidth over the bound's, round by round.
    """

    case: Case
    spec: Spec
    provider: str
    bytes_per_param: int
    error: str | None = None
    num_operators: int | None = None
    seconds: list[float] = field(default_factory=list)
    against_baseline: list[float] = field(default_factory=list)
    against_bound: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def p10(self) -> float:
        return deciles(self.seconds)[0]

    @property
    def p90(self) -> float:
        return deciles(self.seconds)[-1]

    @property
    def bandwidth(self) -> float:
        """Counted bytes a second."""
        return self.num_bytes / self.median

    @property
    def num_bytes(self) -> int:
        return self.bytes_per_param * self.case.numel


def deciles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=10, method="inclusive") if len(values) > 1 else list(values)


def bytes_per_param(provider: Provider, case: Case, spec: Spec) -> int:
    """Every array read once; all but the gradients written once."""
    arrays = READ if provider.is_bound else spec.num_arrays
    return (2 * arrays - 1) * case.dtype.itemsize


def measure(
    case: Case, spec: Spec, providers: Sequence[Provider], settings: Settings
) -> list[Result]:
    """Check every provider, then time the right ones; one result each, in the given order."""
    data = Data.draw(case, settings.seed)
    results = {
        provider: Result(case, spec, provider.name, bytes_per_param(provider, case, spec))
        for provider in providers
    }
    checker = Checker(spec, data)
    for provider, result in results.items():
        result.num_operators, result.error = checker.check(provider)
    del checker  # its tensors make room for the providers
    right = [provider for provider, result in results.items() if result.error is None]
    for group in memory_groups(right, case, spec, settings.memory):
        time_group(group, spec, data, results, settings)
    return list(results.values())


def memory_groups(
    providers: Sequence[Provider], case: Case, spec: Spec, memory: float
) -> Iterator[list[Provider]]:
    """Splits providers so that a group fits; the baseline and the bound are in every group."""
    array = case.numel * case.dtype.itemsize
    shared = [provider for provider in providers if provider in (BASELINE, BOUND)]
    others = [provider for provider in providers if provider not in shared]
    held = (max(spec.num_arrays, READ) - 1) * array
    room = (memory - SHARED_ARRAYS * array) // max(1, held)
    size = max(1, int(room) - len(shared))
    for start in range(0, max(1, len(others)), size):
        yield shared + others[start : start + size]


def time_group(
    group: Sequence[Provider],
    spec: Spec,
    data: Data,
    results: dict[Provider, Result],
    settings: Settings,
) -> None:
    """Adds the times and ratios of every round to the results."""
    order = random.Random(settings.seed)
    hot = data.case.hot
    with no_collection():
        turns = [Turn(Running(provider, spec, data), hot, settings) for provider in group]
        for turn in turns:
            turn.warm_up()
        for _ in range(settings.rounds):
            order.shuffle(turns)
            seconds = {turn.provider: turn.seconds() for turn in turns}
            for provider, value in seconds.items():
                add_round(results, provider, value, seconds)


def add_round(
    results: dict[Provider, Result],
    provider: Provider,
    value: float,
    seconds: dict[Provider, float],
) -> None:
    result = results[provider]
    result.seconds.append(value)
    if BASELINE in seconds:
        result.against_baseline.append(value / seconds[BASELINE])
    if BOUND in seconds:
        bound = results[BOUND].num_bytes / seconds[BOUND]
        result.against_bound.append(result.num_bytes / value / bound)


class Turn:
    """A running provider, and how many steps make one of its turns."""

    def __init__(self, running: Running, hot: bool, settings: Settings) -> None:
        self.provider = running.provider
        self._running = running
        self._hot = hot
        self._settings = settings
        self._factors = random.Random(settings.seed)
        self._steps = 1

    def warm_up(self) -> None:
        self._running.backward(self._factors.uniform(*FACTORS))
        start = perf_counter()
        steps = 0
        while steps == 0 or perf_counter() - start < self._settings.warmup_seconds:
            self._one_step()
            steps += 1
        per_step = (perf_counter() - start) / steps
        self._running.zero_grad()
        self._steps = max(1, int(self._settings.round_seconds / per_step))

    def seconds(self) -> float:
        """Median time of this turn's steps; making the gradients is not counted."""
        if self._hot:
            self._running.backward(self._factors.uniform(*FACTORS))
        spent = median(self._one_step() for _ in range(self._steps))
        self._running.zero_grad()
        return spent

    def _one_step(self) -> float:
        if not self._hot:
            self._running.backward(self._factors.uniform(*FACTORS))
        start = perf_counter()
        self._running.step()
        return perf_counter() - start


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the garbage collector from running in one provider's time for all of them."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
