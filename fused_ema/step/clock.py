"""``base_steps`` of the param groups: samples seen in base batches, where schedules read rho.

Where averages do not move at every step, a group also counts the steps that they have let pass,
``ema_skips``, and the base steps of those, ``ema_waited``.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..together import Call
from .gradients import Control
from .state import counter, counter_device


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError for counts that no step could go on from."""
    for field in ("base_steps", "ema_waited", "stepped_kappa"):
        number(field, group.get(field, 0.0))
    skips = group.get("ema_skips", 0)
    if not isinstance(skips, int) or skips < 0:
        raise ValueError(f"ema_skips={skips!r} is out of range; allowed: an int >= 0")


def number(name: str, value: Any) -> float:
    """A count of steps, finite and ``>= 0``, as a float; else ValueError."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        shown = f"a tensor of {value.numel()}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is {shown}; allowed: {name} >= 0, one finite number")
    return float(value)


def ensure_counter(group: dict[str, Any]) -> None:
    """Put the count where it is kept: a float, or a tensor on the device, see :func:`_on_device`.

    Raises:
        RuntimeError: it is a tensor of more than one element.
    """
    if not _on_device(group):
        group["base_steps"] = float(group["base_steps"])
        return
    device = counter_device(group, group["params"][0])
    group["base_steps"] = counter(group["base_steps"], device, "base_steps")


def advance(
    groups: Sequence[dict[str, Any]],
    kappas: Sequence[float],
    control: Control | None,
    clocked: Container[int],
) -> list[Call]:
    """What counts a step of every group.

    Args:
        groups: the optimizer's param groups.
        kappas: the values that are known on the host.
        control: what may say that no step is taken.
        clocked: indices of groups that are counted by who steps them.
    """
    on_device = []
    calls = []
    for index, (group, kappa) in enumerate(zip(groups, kappas, strict=True)):
        if index in clocked:
            continue
        if _on_device(group):
            on_device.append(group)
        else:
            calls.append(partial(dict.update, group, base_steps=group["base_steps"] + kappa))
    if not on_device:
        return calls
    amounts = [_amount(group, control) for group in on_device]
    for in_tensors in (True, False):
        alike = [
            (group["base_steps"], amount)
            for group, amount in zip(on_device, amounts, strict=True)
            if isinstance(amount, Tensor) is in_tensors
        ]
        if alike:
            calls.append(partial(torch._foreach_add_, *map(list, zip(*alike, strict=True))))
    return calls


def is_due(groups: Sequence[Mapping[str, Any]], every: int) -> bool:
    """Whether averages that move at every ``every``-th step move at this one."""
    return every == 1 or not groups or int(groups[0].get("ema_skips", 0)) + 1 >= every


def ema_span(group: Mapping[str, Any], kappa: Any, to_go: int = 1) -> tuple[Any, Any]:
    """The base steps that a move of the averages covers: the first of them, and their number.

    Args:
        group: a param group.
        kappa: its ``kappa``, a number or a tensor on the device.
        to_go: in how many steps the averages move; 1 is the step at hand.
    """
    begin, waited = group["base_steps"], group.get("ema_waited", 0.0)
    skips = group.get("ema_skips", 0)
    past = waited
    if group["kappa_scales"] == "optimizer":  # each step as one of the base batch
        kappa, past = 1.0, float(skips)
    if waited == 0.0 and to_go == 1:  # no operation on a device
        return begin, kappa
    return begin - waited, past + kappa * to_go


def count_skips(
    groups: Sequence[dict[str, Any]], kappas: Sequence[float], moved: bool
) -> list[Call]:
    """What counts a step at which averages ``moved``, or not."""
    calls = []
    for group, kappa in zip(groups, kappas, strict=True):
        skips = 0 if moved else group.get("ema_skips", 0) + 1
        waited = 0.0 if moved else group.get("ema_waited", 0.0) + kappa
        calls.append(partial(dict.update, group, ema_skips=skips, ema_waited=waited))
    return calls


def restoring_counts(groups: Sequence[dict[str, Any]]) -> list[Call]:
    """What puts back what groups count on the host, as it is when this is called."""
    absent = {"ema_skips": 0, "ema_waited": 0.0}
    return [
        partial(
            dict.update,
            group,
            base_steps=group["base_steps"],
            **{field: group.get(field, default) for field, default in absent.items()},
        )
        for group in groups
        if not group["capturable"]
    ]


def _on_device(group: Mapping[str, Any]) -> bool:
    """Whether the group counts where its parameters are: if it is capturable and has any."""
    return bool(group["capturable"] and group["params"])


def _amount(group: dict[str, Any], control: Control | None) -> Any:
    kappa = group["kappa"]
    if isinstance(kappa, Tensor):
        kappa = kappa.reshape(())
    taken = None if control is None else control.taken(group["base_steps"].device)
    return kappa if taken is None else kappa * taken
