"""A gradient scaler whose check costs our optimizers no pass of its own over the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from .optimizer import FusedScaledOptimizer


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` with two passes over the gradients in all: one for norm and check.

    torch's own reads and writes every gradient to see whether it is finite. Here the sum of squares
    tells, which ``max_grad_norm`` needs anyway: a step reads the gradients twice and writes none.
    Squares are added in float32 at least, so that an element beyond about 1e19 counts as not
    finite. Arguments, methods and other optimizers: as torch's.
    """

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Any]:
        # where step() looks, and update() later
        if not isinstance(optimizer, FusedScaledOptimizer):
            return super()._check_inf_per_device(optimizer)
        found_inf = optimizer.check_gradients()
        checked = {found_inf.device: found_inf}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = checked
        return checked
