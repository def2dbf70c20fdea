"""Sorts parameters into buckets: what one kernel launch can cover."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, dense_order, is_there
from ..ema.decay import decays, ema_keys
from ..extension import native
from ..rules.frozen import FROZEN
from ..rules.rule import Rule
from ..sharding import Sharding, local, sharding_of
from .layout import MOST_SLOTS

# Turns of averages that move apart from their parameters, before and behind all steps.
BEFORE_ALL, AFTER_ALL = -1, sys.maxsize


class Slot(NamedTuple):
    """One parameter of a bucket: the tensor, its group and its index among all, its state."""

    param: Tensor
    group: int
    state: dict[str, Any]
    param_index: int


class Key(NamedTuple):
    """What all slots of a bucket share.

    ``variant`` is that of the bucket's rule. The averages of ``frozen`` parameters alone move, and
    they must not have a gradient.
    ``state_format`` tells whether the rule's states are rounded.
    ``master`` tells whether parameters are rounded copies of weights that the optimizer holds.
    ``layout`` is ``"dense"`` when parameter, states and averages are plain memory in the same order
    without gaps, else ``"strided"``: views with gaps, and tensor subclasses. Of DTensors it is
    that of the local tensors, and ``sharding`` says where the others lie.
    ``turn`` orders buckets: parameters that share memory are stepped one behind the other, and
    their averages move before or behind all of them, in buckets of their own.
    """

    device: torch.device
    dtype: torch.dtype
    layout: str
    variant: str
    frozen: bool
    state_format: str
    master: bool
    emas: tuple[str, ...]
    ema_order: str
    ema_format: str
    differentiable: bool
    capturable: bool
    backend: str
    sharding: Sharding | None
    turn: int

    @property
    def averages_alone(self) -> bool:
        """Whether no parameter moves: all are frozen, or are stepped in other buckets."""
        return self.frozen or self.turn in (BEFORE_ALL, AFTER_ALL)

    @property
    def rounds(self) -> bool:
        """Whether a step takes random bits."""
        return not self.ema_format == self.state_format == "full"


@dataclass(frozen=True)
class Bucket:
    """Slots that one plan steps together.

    ``clocked`` are the groups whose base steps are counted on the device by this plan: of those
    that read them there the last.
    """

    rule: Rule
    key: Key
    slots: tuple[Slot, ...]
    clocked: frozenset[int] = frozenset()

    @property
    def takes_grads(self) -> bool:
        """Whether gradients matter: to step by, or to be refused."""
        return self.rule is not FROZEN or self.key.frozen

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of arithmetic and averages."""
        return COMPUTE_DTYPE[self.key.dtype]

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the rule's states."""
        return self.rule.variants[self.key.variant]

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the states that kernels take: the master if there is one, then the rule's."""
        return _state_keys(self.states, self.key.master)

    def __str__(self) -> str:
        key = self.key
        return f"{len(self.slots)} {key.layout} {key.dtype} parameter(s) on {key.device}"


def _state_keys(states: tuple[str, ...], master: bool) -> tuple[str, ...]:
    return ("master", *states) if master else states


def wants_master(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether the optimizer holds the parameter's weights, once it has been trained."""
    rounded = COMPUTE_DTYPE.get(param.dtype, param.dtype) != param.dtype
    return bool(group["master_weights"]) and rounded


def make_buckets(
    rule: Rule,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, dict[str, Any]],
    requested: Sequence[str],
    turns: Sequence[int | None],
    averaged: bool = True,
) -> list[Bucket]:
    """Group every parameter by what a launch can cover; states must exist already.

    Args:
        rule: the optimizer's rule.
        groups: its param groups.
        state: its state, complete for every parameter.
        requested: the backend asked for, one a group.
        turns: of every parameter, see :func:`~fused_ema.step.overlap.turns`.
        averaged: whether averages move.
    """
    members: dict[Key, list[Slot]] = {}
    count = itertools.count()
    for index, (group, backend) in enumerate(zip(groups, requested, strict=True)):
        for param in group["params"]:
            param_index = next(count)
            if not is_there(param) or param.dtype not in COMPUTE_DTYPE:
                continue
            slot = Slot(param, index, state[param], param_index)
            key = _key(rule, group, slot, backend, averaged)
            turn = turns[param_index]
            parts = [key] if turn is None or rule is FROZEN else _apart(key, turn, slot)
            for part in parts:
                members.setdefault(part, []).append(slot)
    covered = [
        (key, slots[i : i + MOST_SLOTS])
        for key, slots in sorted(members.items(), key=lambda item: item[0].turn)
        for i in range(0, len(slots), MOST_SLOTS)
    ]
    buckets: list[Bucket] = []
    clocked: set[int] = set()
    for key, slots in reversed(covered):
        last = {i for i in _groups_of(slots) - clocked if _has_clock(groups[i], key)}
        clocked |= last
        moving = FROZEN if key.averages_alone else rule
        buckets.append(Bucket(moving, key, tuple(slots), frozenset(last)))
    return buckets[::-1]


def _groups_of(slots: Iterable[Slot]) -> set[int]:
    return {slot.group for slot in slots}


def _has_clock(group: Mapping[str, Any], key: Key) -> bool:
    """Whether the group's base steps are counted on the device of these parameters."""
    return key.capturable and bool(group["params"][0].device == key.device)


def _apart(key: Key, turn: int, slot: Slot) -> list[Key]:
    """What a parameter that shares memory with others is stepped in: its averages apart from it.

    Raises:
        ValueError: what the optimizer keeps of the weights themselves would no longer be theirs.
    """
    if key.master or (key.emas and key.ema_format == "delta"):
        kept = "master_weights=True" if key.master else "ema_format='delta'"
        raise ValueError(
            f"params: parameter {slot.param_index}, of shape {tuple(slot.param.shape)}, shares "
            f"memory with another one, which is not supported with {kept}; allowed: one and the "
            "same Parameter in both places"
        )
    last = BEFORE_ALL if key.ema_order == "before" else AFTER_ALL
    alone = key._replace(turn=last, variant=FROZEN.variant({}), state_format="full")
    stepped = key._replace(turn=turn, emas=(), ema_format="full")
    return [*([] if key.frozen else [stepped]), *([alone] if key.emas else [])]


def is_active(rule: Rule, param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether the rule itself moves the parameter; a frozen one has averages only.

    One that has a master was trained before, and follows it while it is frozen.
    """
    trained = param.requires_grad or param.grad is not None or "master" in state
    return rule is not FROZEN and trained


def _key(rule: Rule, group: Mapping[str, Any], slot: Slot, backend: str, averaged: bool) -> Key:
    # to a rule that moves nothing gradients are nothing
    active = rule is FROZEN or is_active(rule, slot.param, slot.state)
    variant = (rule if active else FROZEN).variant(group)
    states = rule.variants[variant] if active else ()
    emas = ema_keys(len(decays(group["ema_decay"])) if averaged else 0)
    master = "master" in slot.state
    keys = (*_state_keys(states, master), *emas)
    held = [slot.state[key] for key in keys]
    tensors = [local(tensor) for tensor in (slot.param, *held)]
    return Key(
        slot.param.device,
        slot.param.dtype,
        "dense" if all(map(native.is_plain, tensors)) and _same_order(tensors) else "strided",
        variant,
        not active,
        group["state_format"] if states else "full",
        master,
        emas,
        group["ema_order"],
        group["ema_format"] if emas else "full",
        group["differentiable"],
        group["capturable"],
        backend,
        sharding_of(slot.param),
        turn=0,
    )


def _same_order(tensors: Iterable[Tensor]) -> bool:
    orders = {dense_order(tensor) for tensor in tensors}
    return len(orders) == 1 and None not in orders
