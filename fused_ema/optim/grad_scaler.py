"""A gradient scaler whose check costs our optimizers no pass of its own over the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from .base import FusedScaledOptimizer

# What torch's scaler reads to leave unscaling and skipping to the optimizer's step.
FLAG = "_step_supports_amp_scaling"


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` with two passes over the gradients in all: one for norm and check.

    torch's own reads and writes every gradient to see whether it is finite. Here the sum of squares
    tells, which ``max_grad_norm`` needs anyway: a step reads the gradients twice and writes none,
    also of an optimizer without ``fused=True``. After ``unscale_`` gradients are taken as they are.
    Arguments, methods and other optimizers: as torch's.
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """``optimizer.step()`` on unscaled gradients; moves nothing where one is not finite."""
        if not isinstance(optimizer, FusedScaledOptimizer):
            return super().step(optimizer, *args, **kwargs)
        with _unscaling_itself(optimizer):
            return super().step(optimizer, *args, **kwargs)

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Any]:
        # where step() looks, and update() later
        if not isinstance(optimizer, FusedScaledOptimizer):
            return super()._check_inf_per_device(optimizer)
        found_inf = optimizer.check_gradients()
        checked = {found_inf.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = checked
        return checked


@contextmanager
def _unscaling_itself(optimizer: FusedScaledOptimizer) -> Iterator[None]:
    """Let the optimizer say that it does; what the scaler tells it goes, also if a step raises."""
    fields = vars(optimizer)
    given = {FLAG: fields[FLAG]} if FLAG in fields else {}
    fields[FLAG] = True
    try:
        yield
    finally:
        for name in (FLAG, "grad_scale", "found_inf"):
            fields.pop(name, None)
        fields.update(given)
