"""``base_steps`` of the param groups: samples seen in base batches, where schedules read rho."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .state import counter, counter_device


def complete(group: dict[str, Any]) -> None:
    """Put the count where it is kept: a float; a tensor on the device if the group is capturable.

    Raises:
        RuntimeError: it is a tensor of more than one element.
    """
    if not group["capturable"] or not group["params"]:
        group["base_steps"] = float(group["base_steps"])
        return
    device = counter_device(group, group["params"][0])
    group["base_steps"] = counter(group["base_steps"], device, "base_steps")


def advance(groups: Sequence[dict[str, Any]], kappas: Sequence[float]) -> None:
    """Count a step of every group; ``kappas`` are the values that are known on the host."""
    on_device = []
    for group, kappa in zip(groups, kappas, strict=True):
        if group["capturable"]:
            complete(group)  # the user may have set it
            on_device.append(group)
        else:
            group["base_steps"] += kappa
    for in_tensors in (True, False):
        alike = [g for g in on_device if isinstance(g["kappa"], Tensor) is in_tensors]
        if alike:
            clocks = [group["base_steps"] for group in alike]
            torch._foreach_add_(clocks, [_scalar(group["kappa"]) for group in alike])


def _scalar(kappa: Any) -> Any:
    return kappa.reshape(()) if isinstance(kappa, Tensor) else kappa
