"""The benchmarks as pytest runs them: ``pytest bench``, with ``--benchmark-compare`` at hand.

``test_interleaved`` and ``test_host`` compare providers with each other, in turns; ``test_step``
times one at a time, to compare commits. A wrong result fails, a slow one never does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import Any

import pytest

from .cases import CASES, Case, host_cases
from .check import FACTORS, Checker
from .data import Data, Running
from .device import Cpu
from .harness import Result, Settings, measure
from .host import fits, measure_host
from .providers import (
    FEW_PROVIDERS,
    HOST_PROVIDERS,
    OPTIMIZERS,
    OURS,
    PEER,
    PROVIDERS,
    Provider,
)
from .table import host_table, step_table

ADAMW = OPTIMIZERS["adamw"]
SETTINGS = Settings(rounds=7, warmup_seconds=0.05)
CPU = Cpu()

# Alone a provider is timed for as many rounds as fit, but enough for a median.
SECONDS = 1.0
LEAST_ROUNDS, MOST_ROUNDS = 5, 500

# Above this many parameters a provider takes seconds to set up.
MANY = 90_000_000

HOST_CASES = host_cases(hot=False, elements=CPU.host_elements)
STEPS = [
    *((case, provider) for case in CASES.values() for provider in (*OURS, PEER)),
    *((case, provider) for case in HOST_CASES for provider in HOST_PROVIDERS["cpu"]),
]


def named(value: Case | Provider) -> str:
    return value.name.replace(" ", "_")


@lru_cache(maxsize=1)
def checker_of(case: Case) -> Checker:
    return Checker(ADAMW, Data.draw(case, CPU, SETTINGS.seed), CPU)


def fail_on_errors(results: list[Result]) -> None:
    failed = [result for result in results if result.verdict.error]
    errors = [f"{result.provider.name}: {result.verdict.error}" for result in failed]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("case", CASES.values(), ids=named)
def test_interleaved(case: Case, show: Callable[[str], None]) -> None:
    providers = FEW_PROVIDERS if case.numel > MANY else PROVIDERS["cpu"]
    results = measure(case, ADAMW, providers, CPU, SETTINGS)
    show(step_table(results))
    fail_on_errors(results)


def test_host(show: Callable[[str], None]) -> None:
    results = measure_host(ADAMW, CPU, SETTINGS)
    show(host_table(results, fits(results)))
    fail_on_errors(results)


@pytest.mark.parametrize(("case", "provider"), STEPS, ids=named)
def test_step(benchmark: Any, case: Case, provider: Provider) -> None:
    checker = checker_of(case)
    verdict = checker.check(provider)
    assert verdict.error is None, verdict.error
    running = Running(provider, ADAMW, checker.data)
    benchmark.group = case.title
    benchmark.extra_info["torch_ops"] = verdict.num_operators
    benchmark.pedantic(
        running.step,
        setup=lambda: running.backward(FACTORS[0]),
        rounds=rounds_of(running),
        warmup_rounds=1,
    )


def rounds_of(running: Running) -> int:
    """From the second step: the first one also makes the state."""
    for factor in FACTORS[:2]:
        start = perf_counter()
        running.backward(factor)
        running.step()
        spent = perf_counter() - start
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, int(SECONDS / spent)))
