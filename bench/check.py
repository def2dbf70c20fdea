"""Compares a provider's first steps with the reference; a wrong result gets no time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

from fused_ema.step import stepper

from .data import Data, Running
from .device import Device, Launches
from .provider import NotOfferedError, Provider
from .providers import MANY_TENSORS, REFERENCE
from .spec import LR, Spec

# The gradients' factor at each step; all are positive, so that averages do not cancel.
FACTORS = (1.0, 0.6, 1.3)

# Number of roundings by which a provider may differ in one step, each a share of the weight or of
# the distance that it moves. An error of 0.1 % in any one hyper-parameter is larger.
ROUNDINGS = 16

# Standard deviations of a mean over random roundings; a larger error is not due to chance.
SIGMAS = 7.0


class OperatorCount(TorchDispatchMode):
    """Counts the torch operators called inside; two are the profiler's marks of any optimizer.

    It hides from our optimizers, which would otherwise step with torch's operators to be visible to
    it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._seen = stepper.dispatch_modes

    def __enter__(self) -> Self:
        stepper.dispatch_modes = lambda: 0
        return super().__enter__()  # type: ignore[no-any-return,no-untyped-call]

    def __exit__(self, *exception: object) -> None:
        stepper.dispatch_modes = self._seen
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counts:
    """Counts of a step that do not depend on noise, except the first.

    first_step: seconds of the first step, which also creates the state and compiles.
    num_operators: torch operators in a step.
    launches: None if it is not known.
    peak_bytes: the most bytes that a step holds in addition to those held before it.
    """

    first_step: float
    num_operators: int
    launches: Launches | None
    peak_bytes: int


@dataclass(frozen=True)
class Verdict:
    """The counts of a step, or why its provider gets no time.

    left_out: why the provider does not offer the case.
    error: how it fails on the case.
    """

    counts: Counts | None = None
    left_out: str | None = None
    error: str | None = None

    @property
    def is_right(self) -> bool:
        return self.reason is None

    @property
    def reason(self) -> str | None:
        return self.error if self.left_out is None else f"left out, {self.left_out}"


def take_steps(running: Running, device: Device) -> Counts:
    """Take one step with each factor, and count."""
    first, second, last = FACTORS
    running.prepare(first)
    start = perf_counter()
    running.step()
    device.synchronize()
    first_step = perf_counter() - start
    running.prepare(second)
    peak_bytes = device.peak_memory(running.step)
    operators = OperatorCount()

    def counted_step() -> None:
        with operators:
            running.step()

    running.prepare(last)
    launches = device.launches(counted_step)
    return Counts(first_step, operators.count, launches, peak_bytes)


class Checker:
    """The reference's result on one case, with averages in float32, to compare with."""

    def __init__(self, spec: Spec, data: Data, device: Device) -> None:
        self.spec = spec
        self.data = data
        self.device = device
        exact = replace(spec, scenario=replace(spec.scenario, ema_format="full", graphed=False))
        reference = Running(REFERENCE, exact, data)
        for factor in FACTORS:
            reference.prepare(factor)
            reference.step()
        self._weights, self._emas = detached(reference.weights()), reference.emas()

    def check(self, provider: Provider) -> Verdict:
        gc.collect()  # optimizers may be cycles: the one before may still hold its tensors
        try:
            running = Running(provider, self.spec, self.data)
            counts = take_steps(running, self.device)
            failure = None if provider.bound else next(self._failures(running), None)
        except NotOfferedError as reason:
            return Verdict(left_out=str(reason))
        except Exception as error:  # the provider's row reports any error
            return Verdict(error=f"{type(error).__name__}: {error}".splitlines()[0])
        return Verdict(counts, error=failure)

    def _failures(self, running: Running) -> Iterator[str]:
        starts = self.data.views(self.data.weights)
        weights = detached(running.weights())
        for i, (weight, param) in enumerate(zip(weights, running.params, strict=True)):
            if not torch.equal(param, weight.to(param.dtype)):
                yield f"wrong parameters: tensor {i} is no rounded copy of its master"
        for name, found, wanted in (
            ("weights", weights, self._weights),
            ("emas", running.emas(), self._emas),
        ):
            if len(found) != len(wanted):
                yield f"{name}: {len(found)} tensors instead of {len(wanted)}"
                continue
            slack = self.spec.scenario.norm_error
            begun = starts * (len(found) // len(starts))
            triples = list(zip(detached(found), wanted, begun, strict=True))
            # many tensors would take seconds one by one
            together = map(joined, zip(*triples, strict=True))
            if len(triples) > MANY_TENSORS and excess(*together, slack) <= 1.0:
                continue
            for i, triple in enumerate(triples):
                error = excess(*triple, slack)
                if not error <= 1.0:
                    yield f"wrong {name}: tensor {i} is off by {error:.3g} times the tolerance"


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of the tensors in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


@torch.no_grad()
def excess(found: Tensor, wanted: Tensor, start: Tensor, slack: float = 0.0) -> float:
    """The largest error, in units of the allowed rounding plus ``slack`` times the distance moved.

    Decay and gradient may cancel in that distance, so a share of the decay counts too.
    """
    if found.shape != wanted.shape or wanted.numel() == 0:
        return 0.0 if found.shape == wanted.shape else float("inf")
    if found.dtype != wanted.dtype:
        return stochastic_excess(found, wanted, start)
    numbers = torch.finfo(wanted.dtype)
    share = len(FACTORS) * ROUNDINGS * numbers.eps / 2
    moved, size = (wanted - start).abs_(), wanted.abs()
    tolerance = moved.mul_(share + slack).add_(size, alpha=share + slack * LR)
    tolerance.clamp_min_(numbers.tiny)
    return float((found - wanted).abs_().div_(tolerance).max())


def stochastic_excess(found: Tensor, wanted: Tensor, start: Tensor) -> float:
    """The same for 16 bits: a step may be off by one of their units, but not on average.

    An average that moves too little or too far is off along its way in all elements alike. So the
    sum of the errors along the way must stay within :data:`SIGMAS` standard deviations of zero.
    """
    error = found.float() - wanted
    # for values between the average's start and end
    unit = len(FACTORS) * torch.finfo(found.dtype).eps
    tolerance = (
        torch.maximum(wanted.abs(), start.abs()).mul_(unit).add_((wanted - start).abs(), alpha=unit)
    )
    largest = float((error.abs() / tolerance.clamp_min_(torch.finfo(wanted.dtype).tiny)).max())
    along = error * (wanted - start)
    deviation = float(along.square().sum().sqrt()) * SIGMAS
    return max(largest, abs(float(along.sum())) / deviation if deviation else 0.0)
