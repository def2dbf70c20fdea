"""EMA decays: what ``ema_decay`` may be, and the weight it gives at each step.

A schedule is a callable ``t -> rho`` of the samples seen so far in units of the base batch, so
that it runs at the same speed at every batch size: at ``kappa`` one step advances ``t`` by
``kappa`` and uses ``rho(t)**kappa``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from .realmath import Real, at_most, cos
from .scaling import check_range, decay_weight

Schedule: TypeAlias = Callable[[Any], Any]
Decay: TypeAlias = float | Schedule
EmaDecay: TypeAlias = Decay | tuple[Decay, ...] | None


@dataclass(frozen=True)
class CosineDecay:
    """``rho(t) = 1 - (1 - start)*(cos(pi*t/total) + 1)/2`` (BYOL, arXiv 2006.07733, section 3.3).

    Args:
        start: ``rho`` at ``t = 0``, in ``[0, 1]``; it rises to 1 at ``t = total`` and stays there.
        total: length of training in base steps (samples / base batch size), ``> 0``.
    """

    start: float
    total: float

    def __post_init__(self) -> None:
        check_range("start", self.start, 0.0, 1.0)
        if not self.total > 0.0:
            raise ValueError(f"total={self.total!r} is out of range; allowed: total > 0")

    def __call__(self, t: Real) -> Real:
        """The decay after ``t`` base steps: a float, or a tensor as ``t`` is one."""
        progress = at_most(t / self.total, 1.0)
        return 1.0 - (1.0 - self.start) * (cos(math.pi * progress) + 1.0) / 2.0


def decays(ema_decay: EmaDecay) -> tuple[Decay, ...]:
    """``ema_decay`` as a tuple: one entry an average, empty for None."""
    if ema_decay is None:
        return ()
    return tuple(ema_decay) if isinstance(ema_decay, tuple | list) else (ema_decay,)


def check_ema_decay(ema_decay: EmaDecay) -> None:
    """Raise ValueError unless every constant decay is in ``[0, 1]``; schedules: when used."""
    for decay in decays(ema_decay):
        if not callable(decay):
            check_range("ema_decay", decay, 0.0, 1.0)


def is_constant(ema_decay: EmaDecay) -> bool:
    """Whether no average follows a schedule."""
    return not any(callable(decay) for decay in decays(ema_decay))


def ema_weights(ema_decay: EmaDecay, t: Any, kappa: Any) -> tuple[Any, ...]:
    """Weights ``1 - rho(t)**kappa``, one an average; tensors on a device where ``t`` is there.

    Raises:
        ValueError: a decay, or the value a schedule returns, is outside ``[0, 1]``.
    """
    return tuple(_weight(decay, t, kappa) for decay in decays(ema_decay))


def _weight(decay: Decay, t: Any, kappa: Any) -> Any:
    value = decay(t) if callable(decay) else decay
    if isinstance(t, float):
        value = float(value)
    check_range("ema_decay", value, 0.0, 1.0)
    return decay_weight(value, kappa)


def ema_keys(num_emas: int) -> tuple[str, ...]:
    """Names of the averages in the optimizer state: ``ema``, ``ema_1``, ``ema_2``, ..."""
    return tuple("ema" if k == 0 else f"ema_{k}" for k in range(num_emas))
