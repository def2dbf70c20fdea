"""Keeps the plans of an optimizer, and makes them anew when what they rest on changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..dtypes import is_there
from ..extension import native
from ..rules.rule import Rule
from ..sharding import local
from . import clock
from .backends import graphs, requested_backend
from .backends.plan import Plan
from .buckets import make_buckets
from .folding import Check, Folder
from .overlap import turns
from .plans import Plans

Groups: TypeAlias = list[dict[str, Any]]
State: TypeAlias = Mapping[Tensor, dict[str, Any]]
EnsureState: TypeAlias = Callable[[], None]

# How many modes look on at torch's operations: make_fx, fake tensors, a counter of flops.
dispatch_modes = torch._C._len_torch_dispatch_stack


class Stepper:
    """Prepares the steps of an optimizer: one plan a bucket, kept from step to step.

    Args:
        rule: the optimizer's rule.
        backend: ``"auto"`` or a backend's name.

    Attributes:
        folder: the scalars of the step at hand.
        latest: the plans of the last step that was prepared, None before.
    """

    def __init__(self, rule: Rule, backend: str) -> None:
        self._rule = rule
        self._backend = backend
        self._watch: native.Watch | None = None
        self._watched_modes = 0
        self._absent: list[Tensor] = []  # parameters without values, which no plan holds
        self._captured: list[Plan] = []  # a CUDA graph outlives the plan that it was captured from
        self._made: dict[bool, Plans] = {}  # by whether averages move
        self.folder = Folder(rule)
        self.latest: Plans | None = None

    @property
    def plans(self) -> list[Plan]:
        """The buckets' plans at the last step, none before the first."""
        return [] if self.latest is None else self.latest.plans

    @property
    def backends(self) -> tuple[str, ...]:
        """Their backends' names."""
        return () if self.latest is None else self.latest.backends

    def prepare(
        self, groups: Groups, state: State, check: Check, ensure_state: EnsureState, averaged: bool
    ) -> Plans:
        """Read gradients and fold scalars; no parameter, state or average is written.

        What it returns runs the step, once. It holds the gradients until what ``running`` returns
        is called, or ``release``.

        Args:
            groups: the optimizer's param groups.
            state: its state.
            check: see :meth:`~fused_ema.step.folding.Folder.refresh`. It is not kept, and neither
                is ``ensure_state``: they are methods of what holds this object.
            ensure_state: gives every parameter the state that its group needs.
            averaged: whether averages move at this step.

        Raises:
            ValueError: a param group holds a bad value, or parameters share memory where they
                cannot.
            RuntimeError: a gradient that cannot be used, a state of the wrong shape, or no backend
                that can.
        """
        moved = self.folder.refresh(groups, check, averaged) or any(map(is_there, self._absent))
        moved = moved or self._watched_modes != dispatch_modes()
        if moved or self._watch is None or not self._watch.unchanged(groups, state):
            self._drop()
        plans = self._made.get(averaged) or self._make(groups, state, ensure_state, averaged)
        for group in groups:
            if group["capturable"]:
                clock.ensure_counter(group)  # the user may have set it
        self.folder.ask_schedules()
        if not plans.prepare(self.folder):
            self._drop()
            plans = self._make(groups, state, ensure_state, averaged)
            if not plans.prepare(self.folder):
                raise RuntimeError("a parameter or its state changes while it is being stepped")
        self.latest = plans
        return plans

    def release(self) -> None:
        """Let go of the gradients of a step that was prepared, and is not taken."""
        for plans in self._made.values():
            plans.release()

    def forget(self) -> None:
        """Make the plans anew at the next step."""
        self._watch = None

    def _drop(self) -> None:
        """Plans that are not to be used again, whatever fails from here on."""
        self._watch = None
        self.release()
        self._captured += [p for made in self._made.values() for p in made.plans if p.captured]
        self._made.clear()

    def _make(
        self, groups: Groups, state: State, ensure_state: EnsureState, averaged: bool
    ) -> Plans:
        devices = {param.device for group in groups for param in group["params"]}
        if any(map(graphs.is_capturing, devices)):
            raise RuntimeError(
                "step() is being captured in a CUDA graph, and has to make or remake its state and "
                "plans, which a graph cannot repeat; take a step before the capture"
            )
        ensure_state()
        if self._watch is not None and not self._watch.unchanged(groups, state):
            self._drop()  # what moved in memory has made the state follow
        self._watched_modes = dispatch_modes()
        self._absent = [p for group in groups for p in group["params"] if not is_there(p)]
        requested = [requested_backend(group, self._backend) for group in groups]
        params = [local(param) for group in groups for param in group["params"]]
        in_turn = turns(native.spans(params))
        buckets = make_buckets(self._rule, groups, state, requested, in_turn, averaged)
        made = self._made[averaged] = Plans(buckets, groups, params, averaged)
        self._watch = native.Watch(groups, state)
        return made
