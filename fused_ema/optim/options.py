"""The keyword arguments of every optimizer here, as a type."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from ..ema.decay import EmaDecay
from ..ema.teacher import Teacher


class EmaOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer here takes beside its torch namesake's."""

    ema_decay: EmaDecay
    ema: Teacher | None
    ema_order: str
    ema_every: int
    ema_format: str
    rounding_seed: int
    kappa: float
    model: nn.Module | None
    ema_buffers: str | None
    max_grad_norm: float | None
    master_weights: bool
    state_format: str
    backend: str
