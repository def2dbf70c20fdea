"""Holds the plans of an optimizer's buckets and makes them anew when what they rest on changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..dtypes import is_there
from ..extension import native
from ..rules.rule import Rule
from ..sharding import Shards, Spread, local, total
from ..together import Call
from . import clock
from .backends import graphs, requested_backend, select
from .backends.plan import Plan
from .buckets import Bucket, make_buckets
from .folding import Check, Folder
from .gradients import Control, Ending, Measured, Treatment, end
from .overlap import turns

Complete: TypeAlias = Callable[[], None]

# How many modes look on at torch's operations: make_fx, fake tensors, a counter of flops.
dispatch_modes = torch._C._len_torch_dispatch_stack


class Stepper:
    """Steps all parameters of an optimizer, one plan a bucket.

    Args:
        rule: the optimizer's rule.
        backend: ``"auto"`` or a backend's name.
        averaged: whether averages move; if not, they are left as they are.

    Attributes:
        folder: the scalars of the step at hand.
        plans: the buckets' plans, none before the first step.
        backends: their backends' names.
        host_folded: whether the steps of some parameter are counted on the host.
        host_counted: whether those of some group are.
        skips: whether all plans skip a step by themselves.
        clocked: groups whose base steps the plans count.
    """

    def __init__(
        self,
        rule: Rule,
        backend: str,
        averaged: bool = True,
    ) -> None:
        self._rule = rule
        self._backend = backend
        self._averaged = averaged
        self._watch: native.Watch | None = None
        self._absent: list[Tensor] = []  # parameters without values, which no plan holds
        self._captured: list[Plan] = []  # a CUDA graph outlives the plan that it was captured from
        self.folder = Folder(rule, averaged)
        self.plans: list[Plan] = []
        self.backends: tuple[str, ...] = ()
        self._devices: list[torch.device] = []
        self._shards: Shards | None = None
        self._spreads: list[Spread | None] = []
        self._apart = False  # gradients are on several devices, or in several processes
        self._watched = 0
        self._params: list[Tensor] = []  # in all groups, local
        self._written: list[Tensor] = []  # those, then averages
        self._places = native.Places([])
        self._turns: list[int | None] = []
        self.host_folded = False
        self.host_counted = False
        self.skips = False
        self.clocked: frozenset[int] = frozenset()

    def prepare(
        self,
        groups: list[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        check: Check,
        complete: Complete,
    ) -> None:
        """Read gradients and fold scalars; no parameter, state or average is written.

        The gradients are held until what :meth:`running` returns is called, or :meth:`release`.

        Args:
            groups: the optimizer's param groups.
            state: its state.
            check: see :meth:`~fused_ema.step.folding.Folder.refresh`. It is not kept, and neither
                is ``complete``: they are methods of what holds this object.
            complete: gives every parameter the state that its group needs.

        Raises:
            ValueError: a param group holds a bad value, or parameters share memory where they
                cannot.
            RuntimeError: a gradient that cannot be used, a state of the wrong shape, or no backend
                that can.
        """
        moved = self.folder.refresh(groups, check) or any(map(is_there, self._absent))
        moved = moved or self._watched != dispatch_modes()
        if moved or self._watch is None or not self._watch.unchanged(groups, state):
            self._make_plans(groups, state, complete)
        for group in groups:
            if group["capturable"]:
                clock.complete(group)  # the user may have set it
        self.folder.ask_schedules()
        if not (self._lie_apart_as_before() and self._prepare_plans()):
            self._make_plans(groups, state, complete)
            if not (self._lie_apart_as_before() and self._prepare_plans()):
                raise RuntimeError("a parameter or its state changes while it is being stepped")

    def release(self) -> None:
        """Let go of the gradients of a step that was prepared, and is not taken."""
        for plan in self.plans:
            plan.release()

    def forget(self) -> None:
        """Make the plans anew at the next step."""
        self._watch = None

    def gradients(self) -> native.Gradients:
        """Which gradients the parameters have, as prepared."""
        with nullcontext() if self._shards is None else self._shards.gradients():
            return native.Gradients(self._params)

    def takes(self, measured: Measured, treatment: Treatment) -> bool:
        """Whether what was found out before is of this step's gradients, as prepared."""
        with nullcontext() if self._shards is None else self._shards.gradients():
            return measured.fits(treatment, self._params)

    @torch.no_grad()
    def control(self, treatment: Treatment) -> Control:
        """What the step takes of its gradients, as prepared; they are read where it measures them.

        Sharded gradients are measured over all processes, each of which must call it.
        """
        device = self._devices[0] if self._devices else _device(treatment)
        parts: Sequence[Tensor] = ()
        if treatment.measures and self._apart:
            sums = self._total(device)
        else:
            counts = [plan.num_sums for plan in self.plans] if treatment.measures else []
            sums = torch.empty(sum(counts), dtype=torch.float64, device=device)
            parts = sums.split(counts)
        ending = Ending.of(treatment, sums)
        # backwards, so that the last gradients to be read are the first that the step reads
        for plan, part in reversed([*zip(self.plans, parts, strict=False)][1:]):
            plan.norm(part, None)
        if self.plans:
            self.plans[0].norm(parts[0] if parts else None, ending)
        else:
            end(ending)
        return Control(ending.control, treatment.decided)

    def _total(self, device: torch.device) -> Tensor:
        """Sums of squares over all processes and devices, brought to one."""
        own = list(map(_sum_of_squares, self.plans, self._devices))
        sums = total(own, self._spreads)
        return torch.stack([value.to(device, non_blocking=True) for value in sums])

    def running(self, control: Control | None) -> list[Call]:
        """What steps every parameter and moves every average, in place, as prepared."""
        calls: list[Call] = []
        for plan, device in zip(self.plans, self._devices, strict=True):
            calls.append(partial(plan.run, None if control is None else control.on(device)))
        return calls if self._shards is None else [*calls, self._shards.marking_written()]

    def counted(self) -> list[native.Slots]:
        """What the step was counted in, of plans that skip by themselves."""
        return [plan.skipping for plan in self.plans if plan.skipping is not None]

    def _lie_apart_as_before(self) -> bool:
        """Whether what shared memory when the plans were made still does, and nothing else."""
        if self._places.unchanged(self._written):
            return True
        self._places = native.Places(self._written)
        return self._turns == turns(native.spans(self._written))

    def _prepare_plans(self) -> bool:
        if self.host_folded and any(map(graphs.is_capturing, set(self._devices))):
            raise RuntimeError(
                "step() is being captured in a CUDA graph, which would repeat this step's scalars "
                "at every replay; make the optimizer with capturable=True"
            )
        if self._shards is None:
            return all([plan.prepare(self.folder) for plan in self.plans])
        if not self._shards.unchanged():
            return False
        self._shards.redistribute_gradients()
        with self._shards.gradients():
            return all([plan.prepare(self.folder) for plan in self.plans])

    def _make_plans(
        self,
        groups: list[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        complete: Complete,
    ) -> None:
        self._watch = None  # whatever fails below, the old plans are not to be used again
        devices = {param.device for group in groups for param in group["params"]}
        if any(map(graphs.is_capturing, devices)):
            raise RuntimeError(
                "step() is being captured in a CUDA graph, and has to make or remake its state and "
                "plans, which a graph cannot repeat; take a step before the capture"
            )
        self._watched = dispatch_modes()
        self.release()
        self._captured += [plan for plan in self.plans if plan.captured]
        complete()
        self._absent = [p for group in groups for p in group["params"] if not is_there(p)]
        requested = [requested_backend(group, self._backend) for group in groups]
        params = [local(param) for group in groups for param in group["params"]]
        in_turn = turns(native.spans(params))
        buckets = make_buckets(self._rule, groups, state, requested, in_turn, self._averaged)
        self._params = params
        self._written = [*params, *_averages(buckets)]
        self._places, self._turns = native.Places(self._written), turns(native.spans(self._written))
        if any(turn is not None for turn in self._turns[len(params) :]):
            raise ValueError(
                "teacher: a tensor of it, or an average, shares memory with a parameter or "
                "another average; allowed: memory of its own for each"
            )
        self._devices = [bucket.key.device for bucket in buckets]
        self._spreads = [bucket.key.spread for bucket in buckets]
        self._shards = _shards(buckets) if any(self._spreads) else None
        self._apart = self._shards is not None or len(set(self._devices)) > 1
        self.host_folded = not all(bucket.key.capturable for bucket in buckets)
        self.clocked = frozenset().union(*(bucket.clocked for bucket in buckets))
        self.host_counted = not all(group["capturable"] for group in groups)
        chosen = [(select(bucket), bucket) for bucket in buckets]
        self.backends = tuple(backend.NAME for backend, _ in chosen)
        self.plans = [backend.plan(bucket) for backend, bucket in chosen]
        self.skips = all(plan.skipping is not None for plan in self.plans)
        self._watch = native.Watch(groups, state)


def _sum_of_squares(plan: Plan, device: torch.device) -> Tensor:
    """Of a plan's gradients: a 0-dim float64 tensor."""
    sums = torch.empty(plan.num_sums, dtype=torch.float64, device=device)
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
