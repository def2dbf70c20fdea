"""Compares a provider's first steps with the reference: a wrong result gets no time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .data import Data, Running
from .device import Device, Launches
from .providers import REFERENCE, NotOfferedError, Provider, Spec

# One factor a step; all positive, so that no average cancels and loses digits.
FACTORS = (1.0, 0.6, 1.3)

# Roundings that a provider may make differently in one step, each a share of the weight or of the
# distance that it moves. An error of 0.1 % in any one hyper-parameter is larger.
ROUNDINGS = 16


class OperatorCount(TorchDispatchMode):
    """Counts the torch operators called inside; two are the profiler's marks of any optimizer."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Outcome:
    """Weights and averages after the steps, and what the last one called and launched."""

    weights: list[Tensor]
    emas: list[Tensor]
    num_operators: int
    launches: Launches | None


@dataclass(frozen=True)
class Verdict:
    """What a step calls and launches, and why its provider gets no time.

    left_out: it does not offer the case.
    error: it fails on it.
    """

    num_operators: int | None = None
    launches: Launches | None = None
    left_out: str | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        return self.reason is None

    @property
    def reason(self) -> str | None:
        return self.error if self.left_out is None else f"left out, {self.left_out}"


def take_steps(provider: Provider, spec: Spec, data: Data, device: Device) -> Outcome:
    running = Running(provider, spec, data)
    *early, last = FACTORS
    for factor in early:
        running.backward(factor)
        running.step()
    operators = OperatorCount()

    def counted_step() -> None:
        with operators:
            running.step()

    running.backward(last)
    launches = device.launches(counted_step)
    weights = [param.detach() for param in running.params]
    return Outcome(weights, list(running.emas()), operators.count, launches)


class Checker:
    """Holds the reference's result on one case."""

    def __init__(self, spec: Spec, data: Data, device: Device) -> None:
        self.spec = spec
        self.data = data
        self.device = device
        self.expected = take_steps(REFERENCE, spec, data, device)

    def check(self, provider: Provider) -> Verdict:
        try:
            outcome = take_steps(provider, self.spec, self.data, self.device)
        except NotOfferedError as reason:
            return Verdict(left_out=str(reason))
        except Exception as error:  # whatever it is, it is reported in the provider's row
            return Verdict(error=f"{type(error).__name__}: {error}".splitlines()[0])
        failure = None if provider.bound else next(self._failures(outcome), None)
        return Verdict(outcome.num_operators, outcome.launches, error=failure)

    def _failures(self, outcome: Outcome) -> Iterator[str]:
        start = self.data.views(self.data.weights)
        for name in ("weights", "emas"):
            found, wanted = getattr(outcome, name), getattr(self.expected, name)
            if len(found) != len(wanted):
                yield f"{name}: {len(found)} tensors instead of {len(wanted)}"
                continue
            for i, tensors in enumerate(zip(found, wanted, start, strict=True)):
                error = excess(*tensors)
                if not error <= 1.0:
                    yield f"wrong {name}: tensor {i} is off by {error:.3g} times the tolerance"


@torch.no_grad()
def excess(found: Tensor, wanted: Tensor, start: Tensor) -> float:
    """The largest error, in units of what rounding may do."""
    if found.shape != wanted.shape or wanted.numel() == 0:
        return 0.0 if found.shape == wanted.shape else float("inf")
    numbers = torch.finfo(wanted.dtype)
    share = len(FACTORS) * ROUNDINGS * numbers.eps / 2
    tolerance = (wanted - start).abs_().add_(wanted.abs()).mul_(share).clamp_min_(numbers.tiny)
    return float((found - wanted).abs_().div_(tolerance).max())
