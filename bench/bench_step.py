"""Micro-benchmarks for pytest: ``pytest bench``, which supports ``--benchmark-compare``.

They time one provider at a time, to compare commits; ``python -m bench.run`` compares providers, in
turns. A wrong result fails; a slow one never does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from time import perf_counter
from typing import Any

import pytest

from .cases import CASES, Case, host_cases
from .check import FACTORS, Checker
from .data import Data, Running
from .device import Cpu
from .harness import Settings
from .provider import Provider
from .providers import AVERAGES, FOREACH, NATIVE, PEER
from .spec import BF16, CHAIN, EMA, OPTIMIZERS, STEP, THREE, Scenario

CPU = Cpu()

# Time for the rounds of one benchmark.
SECONDS = 1.0
LEAST_ROUNDS, MOST_ROUNDS = 5, 500

LERP = AVERAGES[0]
MODELS = [CASES[name] for name in ("resnet18", "vit_b16", "tiny_10000x64")]
HOST = host_cases(hot=False, elements=CPU.host_elements)
STEPS = [
    *((STEP, case, provider) for case in MODELS for provider in (NATIVE, FOREACH, PEER)),
    *((STEP, CASES[name], NATIVE) for name in ("resnetv2_50", "groups50", "one_100m")),
    *((STEP, case, provider) for case in HOST for provider in (NATIVE, PEER)),
    *(
        (s, CASES["resnet18"], provider)
        for s in (CHAIN, THREE, BF16)
        for provider in (NATIVE, PEER)
    ),
    *((EMA, MODELS[0], provider) for provider in (NATIVE, LERP)),
]


def named(value: Scenario | Case | Provider) -> str:
    return value.name.replace(" ", "_")


@lru_cache(maxsize=1)
def checker_of(scenario: Scenario, case: Case) -> Checker:
    spec = replace(OPTIMIZERS["adamw"], scenario=scenario)
    return Checker(spec, Data.draw(case, scenario.dtype, CPU, Settings.seed), CPU)


@pytest.mark.parametrize(("scenario", "case", "provider"), STEPS, ids=named)
def test_step(benchmark: Any, scenario: Scenario, case: Case, provider: Provider) -> None:
    checker = checker_of(scenario, case)
    verdict = checker.check(provider)
    assert verdict.is_right, verdict.reason
    running = Running(provider, checker.spec, checker.data)
    benchmark.group = f"{case.title}, {scenario.title}"
    benchmark.extra_info["torch_ops"] = verdict.counts.num_operators
    benchmark.pedantic(
        running.step,
        setup=lambda: running.prepare(FACTORS[0]),
        rounds=rounds_of(running),
        warmup_rounds=1,
    )


def rounds_of(running: Running) -> int:
    """The number of rounds, from the time of the second step: the first also creates the state."""
    for factor in FACTORS[:2]:
        start = perf_counter()
        running.prepare(factor)
        running.step()
        spent = perf_counter() - start
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, int(SECONDS / spent)))
