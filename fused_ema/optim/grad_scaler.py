"""A gradient scaler whose check needs no pass of its own over the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ..wrapped import unwrapped
from .base import FusedScaledOptimizer

# The attribute by which torch's scaler leaves unscaling and skipping to the optimizer's step.
FLAG = "_step_supports_amp_scaling"
TOLD = (FLAG, "grad_scale", "found_inf", "_measured")


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` with one pass over the gradients for norm and check together.

    Torch's own scaler reads and writes every gradient to see whether it is finite. This one takes
    the answer from the sum of squares, which ``max_grad_norm`` needs anyway: a step reads the
    gradients twice and writes none, even without the optimizer's ``fused=True``. After ``unscale_``
    it takes gradients as they are. Arguments, methods and the behaviour with other optimizers are
    torch's.
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Call ``optimizer.step()`` on unscaled gradients; move nothing if one is not finite.

        The result of the check is used in this step alone. If a hook of the step replaces the
        gradients, they are read again.
        """
        if not isinstance(optimizer, FusedScaledOptimizer) or not self._enabled:
            return super().step(optimizer, *args, **kwargs)
        states = self._per_optimizer_states[id(optimizer)]
        inner: FusedScaledOptimizer = unwrapped(optimizer)
        if states["stage"] is not OptState.READY or "closure" in kwargs:
            with _telling(inner):
                return super().step(optimizer, *args, **kwargs)
        self._check_scale_growth_tracker("step")
        scale = self._get_scale_async()
        given = getattr(inner, "grad_scale", None)
        if scale is not None and given is not None:  # as torch
            scale = scale * given
        measured = inner._measure(scale, "step()")
        found_inf = measured.found_inf
        states["found_inf_per_device"] = {found_inf.device: found_inf}
        told = {"grad_scale": scale, "found_inf": found_inf, "_measured": measured}
        with _telling(inner, **told):
            value: float | None = optimizer.step(*args, **kwargs)
        states["stage"] = OptState.STEPPED
        return value


@contextmanager
def _telling(optimizer: FusedScaledOptimizer, **told: Any) -> Iterator[None]:
    """Set attributes that tell the optimizer's step to unscale; remove them in any case."""
    fields = vars(optimizer)
    given = {FLAG: fields[FLAG]} if FLAG in fields else {}
    fields.update(told, **{FLAG: True})
    try:
        yield
    finally:
        for name in TOLD:
            fields.pop(name, None)
        fields.update(given)
