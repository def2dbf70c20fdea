"""EMA decays: the values that ``ema_decay`` takes, and the EMA rate of each step.

A schedule is a callable ``t -> rho``. ``t`` counts the samples seen in units of the base batch, so
that a schedule runs at the same speed at every batch size. One step at ``kappa`` advances ``t`` by
``kappa`` and uses ``rho**kappa``, with ``rho`` read in the middle of the base steps that it covers,
see :func:`midpoint`. A schedule that knows its product over ``kappa`` base steps may also have
``geometric_mean(t, kappa)``, see :func:`decay_at`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..checks import check_range
from ..realmath import (
    Real,
    at_least,
    at_most,
    ceil,
    cos,
    exp,
    log,
    log1p,
    power,
    sqrt,
    surely,
    where,
)
from ..scaling import decay_weight
from ..values import several

Schedule: TypeAlias = Callable[[Any], Any]
Decay: TypeAlias = float | Schedule
EmaDecay: TypeAlias = Decay | tuple[Decay, ...] | None
EmaOrder: TypeAlias = Literal["after", "before"]


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


@dataclass(frozen=True)
class WarmUpDecay:
    """``rho(t) = min(limit, (1 + t)/(10 + t))`` (TensorFlow's ``ExponentialMovingAverage``).

    A step of ``kappa`` base steps takes their whole product, see :meth:`geometric_mean`.

    Args:
        limit: the decay that ``rho`` rises to from 0.1, in ``[0, 1]``.
    """

    limit: float

    def __post_init__(self) -> None:
        check_range("limit", self.limit, 0.0, 1.0)

    def __call__(self, t: Real) -> Real:
        """The decay after ``t`` base steps: a float, or a tensor as ``t`` is one."""
        return at_most((1.0 + t) / (10.0 + t), self.limit)

    def geometric_mean(self, t: Real, kappa: Any) -> Real:
        """The decay whose power ``kappa`` is the product over ``kappa`` base steps from ``t``.

        All but nine of ``n`` factors below the limit cancel, which leaves the product of
        ``(t + i)/(t + n + i)`` over ``i = 1 .. 9``.
        """
        if surely(kappa == 1.0):
            return self(t)
        end = math.inf if self.limit == 1.0 else (10.0 * self.limit - 1.0) / (1.0 - self.limit)
        n = at_least(at_most(ceil(at_most(end - t, kappa)), kappa), 0.0)
        logarithm = -sum(log1p(n / (t + i)) for i in range(1, 10))
        if self.limit < 1.0:
            logarithm = logarithm + (kappa - n) * log(self.limit)
        mean: Real = at_most(exp(logarithm / kappa), self.limit)
        return where(kappa == 1.0, self(t), mean)


@dataclass(frozen=True)
class InverseGammaDecay:
    """``rho(t) = min(limit, 1 - (1 + t/inv_gamma)**-power)`` (Crowson's ``EMAWarmup``).

    A step of ``kappa`` base steps uses nearly their whole product, see :meth:`geometric_mean`.

    Args:
        limit: the decay that ``rho`` rises to from 0, in ``[0, 1]``.
        inv_gamma: base steps until the warm-up bends, ``> 0``.
        power: how fast ``rho`` rises, ``> 0``: at ``inv_gamma = 1`` a ``power`` of 2/3 reaches
            0.999 at ``t = 31.6e3`` and 0.9999 at ``t = 1e6``.
    """

    limit: float
    inv_gamma: float = 1.0
    power: float = 2.0 / 3.0

    def __post_init__(self) -> None:
        check_range("limit", self.limit, 0.0, 1.0)
        check_range("inv_gamma", self.inv_gamma, 0.0, math.inf, ends=("<", "<"))
        check_range("power", self.power, 0.0, math.inf, ends=("<", "<"))

    def __call__(self, t: Real) -> Real:
        """The decay after ``t`` base steps: a float, or a tensor as ``t`` is one."""
        return at_most(1.0 - power(1.0 + t / self.inv_gamma, -self.power), self.limit)

    def geometric_mean(self, t: Real, kappa: Any) -> Real:
        """The decay whose power ``kappa`` is about the product over ``kappa`` base steps.

        It reads ``rho`` at two points, ``sqrt((kappa**2 - 1)/12)`` to both sides of the middle.
        That is exact if ``log(rho)`` is a cubic, and at ``kappa`` 1 and 2. A product that begins at
        ``rho(0) = 0`` is 0.
        """
        if surely(kappa == 1.0):
            return self(t)
        side = sqrt(at_least(kappa * kappa - 1.0, 0.0) / 12.0)
        middle = midpoint(t, kappa)
        mean: Real = sqrt(self(at_least(middle - side, 0.0)) * self(middle + side))
        return where(t == 0.0, 0.0, mean)


@dataclass(frozen=True)
class PowerDecay:
    """``rho(t) = (t/(t + 1))**(gamma + 1)``: averages with weights ``tau**gamma`` up to ``t``.

    The power-function average of Karras et al. 2024 (arXiv 2312.02696, Equation 2, which counts the
    current step too: its ``1 - 1/t`` is ``t/(t + 1)`` here). ``rho(0) = 0``, so the average forgets
    the start. A step of ``kappa`` base steps uses their whole product,
    ``(t/(t + kappa))**(gamma + 1)`` (Equation 127). The average therefore has the same profile at
    every ``kappa``, and through changes of it.

    Args:
        gamma: sharpness of the profile, ``0 <= gamma < inf``; 0 is the plain mean.
    """

    gamma: float

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0, math.inf, ends=("<=", "<"))

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float) -> PowerDecay:
        """Return the profile of a given width.

        The largest root of ``(gamma + 1) = sigma_rel**2 * (gamma + 2)**2 * (gamma + 3)``
        (Equations 123 and 126) by Viete's formula for a cubic with three real roots.

        Args:
            sigma_rel: standard deviation of the profile as a share of ``t``, in
                ``(0, 12**-0.5]``; the paper tracks 0.05 and 0.10.

        Raises:
            ValueError: ``sigma_rel`` is out of its range.
        """
        check_range("sigma_rel", sigma_rel, 0.0, 12.0**-0.5, ends=("<", "<="))
        u = 1.0 / sigma_rel**2
        # with gamma + 2 = y - 1/3 it is y**3 - 3*c**2*y + d = 0, and y = 2*c*cos(angle/3)
        c = math.sqrt((u + 1.0 / 3.0) / 3.0)
        d = 2.0 / 27.0 + 4.0 / 3.0 * u
        y = 2.0 * c * math.cos(math.acos(-d / (2.0 * c**3)) / 3.0)
        return cls(max(y - 7.0 / 3.0, 0.0))

    @property
    def sigma_rel(self) -> float:
        """Standard deviation of the profile as a share of ``t`` (Equation 123)."""
        return math.sqrt((self.gamma + 1.0) / (self.gamma + 3.0)) / (self.gamma + 2.0)

    def __call__(self, t: Real) -> Real:
        """The decay after ``t`` base steps: a float, or a tensor as ``t`` is one."""
        return self.geometric_mean(t, 1.0)

    def geometric_mean(self, t: Real, kappa: Any) -> Real:
        """The decay whose power ``kappa`` is the product over ``kappa`` base steps from ``t``."""
        result: Real = power(t / (t + kappa), (self.gamma + 1.0) / kappa)
        return result


def decay_from_half_life(half_life_samples: float, base_batch_size: float) -> float:
    """``rho = 0.5**(base_batch_size / half_life_samples)``, in float64.

    Args:
        half_life_samples: number of samples after which a weight counts half, finite and ``> 0``.
        base_batch_size: samples in a step at ``kappa = 1``, finite and ``> 0``.

    Returns:
        The constant decay at the base batch size.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_range("half_life_samples", half_life_samples, 0.0, math.inf, ends=("<", "<"))
    check_range("base_batch_size", base_batch_size, 0.0, math.inf, ends=("<", "<"))
    return math.pow(0.5, base_batch_size / half_life_samples)


def decays(ema_decay: EmaDecay) -> tuple[Decay, ...]:
    """``ema_decay`` as a tuple with one entry an average, empty for None."""
    if ema_decay is None:
        return ()
    given = several(ema_decay)
    return tuple(given) if isinstance(given, tuple | list) else (given,)


def check_ema_decay(ema_decay: EmaDecay) -> None:
    """Raise ValueError unless every constant decay is in ``[0, 1]``; steps check schedules."""
    if ema_decay is not None and not decays(ema_decay):
        raise ValueError(
            f"ema_decay={ema_decay!r} is empty; allowed: a decay, a sequence of them, or None for "
            "no average"
        )
    for decay in decays(ema_decay):
        if not callable(decay):
            check_range("ema_decay", decay, 0.0, 1.0)


def is_constant(ema_decay: EmaDecay) -> bool:
    """Whether no average follows a schedule."""
    return not any(callable(decay) for decay in decays(ema_decay))


def ema_rates(ema_decay: EmaDecay, t: Any, kappa: Any) -> tuple[Any, ...]:
    """EMA rates ``1 - rho**kappa`` of a step from ``t``, one an average; tensors if ``t`` is one.

    Raises:
        ValueError: a decay, or the value a schedule returns, is outside ``[0, 1]``.
    """
    return tuple(_weight(decay, t, kappa) for decay in decays(ema_decay))


def midpoint(t: Real, kappa: Any) -> Real:
    """The mean of ``t, t + 1, ..., t + kappa - 1``, where ``kappa`` base steps read a schedule.

    It is ``t`` itself at ``kappa = 1``, and earlier for a smaller ``kappa``, but never before 0.
    """
    return t if surely(kappa == 1.0) else at_least(t + (kappa - 1.0) / 2.0, 0.0)


def decay_at(decay: Decay, t: Any, kappa: Any) -> Any:
    """The decay of a step of ``kappa`` base steps from ``t``, before it is raised to ``kappa``.

    That is a schedule's ``geometric_mean(t, kappa)`` if it has one, else its value in the middle of
    the base steps.
    """
    if not callable(decay):
        return decay
    if hasattr(decay, "geometric_mean"):
        return decay.geometric_mean(t, kappa)
    return decay(midpoint(t, kappa))


def scaled_decay(ema_decay: EmaDecay, t: float, kappa: float) -> float | tuple[float, ...] | None:
    """``rho**kappa`` of a step from ``t``: a tuple where ``ema_decay`` is one, None without.

    Raises:
        ValueError: as :func:`ema_rates`.
    """
    values = tuple(power(_decay(decay, t, kappa), kappa) for decay in decays(ema_decay))
    if isinstance(ema_decay, tuple | list):
        return values
    return values[0] if values else None


def _weight(decay: Decay, t: Any, kappa: Any) -> Any:
    return decay_weight(_decay(decay, t, kappa), kappa)


def _decay(decay: Decay, t: Any, kappa: Any) -> Any:
    value = decay_at(decay, t, kappa)
    if isinstance(t, float):
        value = float(value)
    check_range("ema_decay", value, 0.0, 1.0)
    return value


def ema_keys(num_emas: int) -> tuple[str, ...]:
    """Keys of the averages in a parameter's state: ``ema``, ``ema_1``, ``ema_2``, ..."""
    return tuple("ema" if k == 0 else f"ema_{k}" for k in range(num_emas))
