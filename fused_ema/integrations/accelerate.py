"""accelerate: a prepared optimizer through which everything is reachable."""

from __future__ import annotations

from typing import Any

import accelerate
from accelerate.optimizer import AcceleratedOptimizer

from .. import FusedScaledOptimizer
from ..wrapped import forward, unwrapped


class Accelerator(accelerate.Accelerator):
    """``accelerate.Accelerator``, whose prepared optimizers are :func:`reachable`."""

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """Prepare an optimizer, as accelerate does, and make it :func:`reachable`."""
        return reachable(super().prepare_optimizer(optimizer, device_placement))


def reachable(optimizer: Any) -> Any:
    """Let a prepared optimizer act as the fused optimizer inside it, in place.

    accelerate's wrapper knows torch's methods alone, and keeps ``kappa = 8`` to itself. After this
    call the methods and properties of the fused optimizer act through it.

    Args:
        optimizer: what ``accelerator.prepare(optimizer)`` returned; modified in place.

    Returns:
        The same object. Without a fused optimizer inside, it is unchanged.
    """
    inner = unwrapped(optimizer)
    if type(optimizer) is AcceleratedOptimizer and isinstance(inner, FusedScaledOptimizer):
        made = type(f"Accelerated{type(inner).__name__}", (AcceleratedOptimizer, type(inner)), {})
        forward(made, type(inner))
        optimizer.__class__ = made
    return optimizer
