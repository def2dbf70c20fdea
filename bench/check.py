"""Compares a provider's first steps with the reference: a wrong result gets no time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .data import Data, Running
from .providers import Provider, Spec, ours

# One factor a step; all positive, so that no average cancels and loses digits.
FACTORS = (1.0, 0.6, 1.3)

# Roundings that a provider may make differently in one step, each a share of the weight or of the
# distance that it moves. An error of 0.1 % in any one hyper-parameter is larger.
ROUNDINGS = 16

REFERENCE = ours("reference")


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
    """Weights and averages after the steps, and the torch operators of the last one."""

    weights: list[Tensor]
    emas: list[Tensor]
    num_operators: int


def take_steps(provider: Provider, spec: Spec, data: Data) -> Outcome:
    running = Running(provider, spec, data)
    for factor in FACTORS:
        running.backward(factor)
        with OperatorCount() as operators:
            running.step()
    weights = [param.detach() for param in running.params]
    return Outcome(weights, list(running.emas()), operators.count)


class Checker:
    """Holds the reference's result on one case."""

    def __init__(self, spec: Spec, data: Data) -> None:
        self.spec = spec
        self.data = data
        self.expected = take_steps(REFERENCE, spec, data)

    def check(self, provider: Provider) -> tuple[int | None, str | None]:
        """Torch operators of a step, or why the provider gets no time."""
        try:
            outcome = take_steps(provider, self.spec, self.data)
        except Exception as error:  # whatever it is, it is reported in the provider's row
            return None, f"{type(error).__name__}: {error}".splitlines()[0]
        if provider.is_bound:
            return outcome.num_operators, None
        return outcome.num_operators, next(self._failures(outcome), None)

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
