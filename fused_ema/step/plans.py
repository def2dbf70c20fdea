"""The plans of all buckets of an optimizer, made together, and what a step does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import widest
from ..extension import native
from ..sharding import Sharding, Shards, local, total
from ..together import Call
from .backends import graphs, select
from .backends.plan import Fold, Plan
from .buckets import Bucket
from .gradients import Control, Ending, Measured, Treatment, end
from .overlap import turns


class Plans:
    """One plan a bucket, for the tensors that they were made for.

    Args:
        buckets: of all parameters.
        groups: the optimizer's param groups.
        params: their parameters, local, in order.
        averaged: whether averages move; if not, they are left as they are.

    Attributes:
        plans: one a bucket.
        backends: the backends' names, one a bucket.
        host_counted: whether the steps of some group are counted on the host.
        skips: whether all plans skip a step by themselves.
        clocked: groups whose base steps the plans count.

    Raises:
        RuntimeError: no backend can step a bucket.
        ValueError: an average shares memory with a parameter or another average.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        groups: Sequence[Mapping[str, Any]],
        params: list[Tensor],
        averaged: bool,
    ) -> None:
        self.averaged = averaged
        self._params = params
        self._written = [*params, *_averages(buckets)]
        self._addresses = native.Addresses(self._written)
        self._turns = turns(native.spans(self._written))
        if any(turn is not None for turn in self._turns[len(params) :]):
            raise ValueError(
                "teacher: a tensor of it, or an average, shares memory with a parameter or "
                "another average; allowed: memory of its own for each"
            )
        self._devices = [bucket.key.device for bucket in buckets]
        self._shardings: list[Sharding | None] = [bucket.key.sharding for bucket in buckets]
        self._shards = _shards(buckets) if any(self._shardings) else None
        # gradients are on several devices, or in several processes
        self._apart = self._shards is not None or len(set(self._devices)) > 1
        self._host_folded = not all(bucket.key.capturable for bucket in buckets)
        self.host_counted = not all(group["capturable"] for group in groups)
        self.clocked: frozenset[int] = frozenset().union(*(b.clocked for b in buckets))
        chosen = [(select(bucket), bucket) for bucket in buckets]
        self.backends = tuple(backend.NAME for backend, _ in chosen)
        self.plans: list[Plan] = [backend.plan(bucket) for backend, bucket in chosen]
        self.skips = all(plan.skipping is not None for plan in self.plans)

    def prepare(self, fold: Fold) -> bool:
        """Read gradients and fold scalars, see :meth:`~fused_ema.step.backends.plan.Plan.prepare`.

        False: something lies elsewhere or otherwise than planned, and plans must be made anew.

        Raises:
            RuntimeError: a gradient that cannot be used, or a graph that would repeat one step.
        """
        if not self._lie_apart_as_before():
            return False
        if self._host_folded and any(map(graphs.is_capturing, set(self._devices))):
            raise RuntimeError(
                "step() is being captured in a CUDA graph, which would repeat this step's scalars "
                "at every replay; make the optimizer with capturable=True"
            )
        if self._shards is None:
            return all([plan.prepare(fold) for plan in self.plans])
        if not self._shards.unchanged():
            return False
        self._shards.redistribute_gradients()
        with self._shards.gradients():
            return all([plan.prepare(fold) for plan in self.plans])

    def release(self) -> None:
        """Let go of the gradients of a step that was prepared, and is not taken."""
        for plan in self.plans:
            plan.release()

    def gradients(self) -> native.Gradients:
        """Which gradients the parameters have, as prepared."""
        with self._local_gradients():
            return native.Gradients(self._params)

    def takes(self, measured: Measured, treatment: Treatment) -> bool:
        """Whether what was found out before is of this step's gradients, as prepared."""
        with self._local_gradients():
            return measured.fits(treatment, self._params)

    @torch.no_grad()
    def control(self, treatment: Treatment) -> Control:
        """What the step takes of its gradients, as prepared; they are read where it measures them.

        Sharded gradients are measured over all processes, each of which must call it.
        """
        device = self._devices[0] if self._devices else _device(treatment)
        partial_sums: Sequence[Tensor] = ()
        if treatment.measures and self._apart:
            sums = self._total(device)
        else:
            counts = [plan.num_sums for plan in self.plans] if treatment.measures else []
            sums = torch.empty(sum(counts), dtype=widest(device), device=device)
            partial_sums = sums.split(counts)
        ending = Ending.of(treatment, sums)
        # backwards, so that the last gradients to be read are the first that the step reads
        for plan, part in reversed([*zip(self.plans, partial_sums, strict=False)][1:]):
            plan.norm(part, None)
        if self.plans:
            self.plans[0].norm(partial_sums[0] if partial_sums else None, ending)
        else:
            end(ending)
        return Control(ending.control, treatment.decided)

    def running(self, control: Control | None) -> list[Call]:
        """What steps every parameter and moves every average, in place, as prepared."""
        calls: list[Call] = []
        for plan, device in zip(self.plans, self._devices, strict=True):
            calls.append(partial(plan.run, None if control is None else control.on(device)))
        return calls if self._shards is None else [*calls, self._shards.marking_written()]

    def counted(self) -> list[native.Slots]:
        """What the step is counted in, of plans that skip by themselves."""
        return [plan.skipping for plan in self.plans if plan.skipping is not None]

    def _lie_apart_as_before(self) -> bool:
        """Whether what shared memory when the plans were made still does, and nothing else."""
        if self._addresses.unchanged(self._written):
            return True
        self._addresses = native.Addresses(self._written)
        return self._turns == turns(native.spans(self._written))

    def _local_gradients(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shards is None else self._shards.gradients()

    def _total(self, device: torch.device) -> Tensor:
        """Sums of squares over all processes and devices, brought to one."""
        own = list(map(_sum_of_squares, self.plans, self._devices))
        sums = total(own, self._shardings)
        wide = widest(device)
        return torch.stack([value.to(device, wide, non_blocking=True) for value in sums])


def _sum_of_squares(plan: Plan, device: torch.device) -> Tensor:
    """The sum over one plan's gradients: a 0-dim tensor."""
    sums = torch.empty(plan.num_sums, dtype=widest(device), device=device)
    ending = Ending.of(Treatment(), sums)
    plan.norm(sums, ending)
    return Control(ending.control, decided=True).squares


def _device(treatment: Treatment) -> torch.device:
    """Where there are no plans: beside what is given."""
    given = (number for number in treatment if isinstance(number, Tensor))
    return next((number.device for number in given), torch.device("cpu"))


def _averages(buckets: Sequence[Bucket]) -> list[Tensor]:
    return [
        local(slot.state[key])
        for bucket in buckets
        for slot in bucket.slots
        for key in bucket.key.emas
    ]


def _shards(buckets: Sequence[Bucket]) -> Shards:
    slots = [(bucket, slot) for bucket in buckets for slot in bucket.slots]
    return Shards(
        params=[slot.param for _, slot in slots],
        averages=[slot.state[key] for bucket, slot in slots for key in bucket.key.emas],
        states=[slot.state[key] for bucket, slot in slots for key in bucket.state_keys],
    )
