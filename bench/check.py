"""Compares a provider's first steps with the reference: a wrong result gets no time."""

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

# One factor a step; all positive, so that no average cancels and loses digits.
FACTORS = (1.0, 0.6, 1.3)

# Roundings that a provider may make differently in one step, each a share of the weight or of the
# distance that it moves. An error of 0.1 % in any one hyper-parameter is larger.
ROUNDINGS = 16

# Of a mean over random roundings, beyond which there is more than chance to it.
SIGMAS = 7.0


class OperatorCount(TorchDispatchMode):
    """Counts the torch operators called inside; two are the profiler's marks of any optimizer.

    Our optimizers would step by torch's operators to be seen by it: it hides from them.
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
    """What does not depend on the machine's mood, but for the first.

    first_step: seconds; it also makes the state and compiles what is compiled at first use.
    num_operators: of torch, in a step.
    launches: None if there is no telling.
    peak_bytes: that a step holds at once beyond what was held before it.
    """

    first_step: float
    num_operators: int
    launches: Launches | None
    peak_bytes: int


@dataclass(frozen=True)
class Verdict:
    """What a step costs in counts, and why its provider gets no time.

    left_out: it does not offer the case.
    error: it fails on it.
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
    """One with each factor."""
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
    """Holds the result of the reference on one case, with averages in float32."""

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
        gc.collect()  # optimizers are cycles: the one before may still hold its tensors
        try:
            running = Running(provider, self.spec, self.data)
            counts = take_steps(running, self.device)
            failure = None if provider.bound else next(self._failures(running), None)
        except NotOfferedError as reason:
            return Verdict(left_out=str(reason))
        except Exception as error:  # whatever it is, it is reported in the provider's row
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
            # one by one, many take seconds
            together = map(joined, zip(*triples, strict=True))
            if len(triples) > MANY_TENSORS and excess(*together, slack) <= 1.0:
                continue
            for i, triple in enumerate(triples):
                error = excess(*triple, slack)
                if not error <= 1.0:
                    yield f"wrong {name}: tensor {i} is off by {error:.3g} times the tolerance"


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all elements."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


@torch.no_grad()
def excess(found: Tensor, wanted: Tensor, start: Tensor, slack: float = 0.0) -> float:
    """The largest error, in units of what rounding may do, and ``slack`` to the way moved.

    Decay and gradient may cancel in that way: a share of the decay's counts, too.
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
    """Likewise for 16 bits: each step may err by one of their units, but on average by nothing.

    An average that moves too little or too far errs along its way, in all elements alike: the sum
    of what they err along it stays within :data:`SIGMAS` standard deviations of zero.
    """
    error = found.float() - wanted
    # of values between where the average was and where it is
    unit = len(FACTORS) * torch.finfo(found.dtype).eps
    tolerance = (
        torch.maximum(wanted.abs(), start.abs()).mul_(unit).add_((wanted - start).abs(), alpha=unit)
    )
    largest = float((error.abs() / tolerance.clamp_min_(torch.finfo(wanted.dtype).tiny)).max())
    along = error * (wanted - start)
    deviation = float(along.square().sum().sqrt()) * SIGMAS
    return max(largest, abs(float(along.sum())) / deviation if deviation else 0.0)
