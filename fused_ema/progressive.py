"""Progressive scaling: the batch size grows during training, and ``kappa`` with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from .checks import check_range
from .wrapped import unwrapped

UNITS = ("epochs", "samples")


class Scaled(Protocol):
    """An optimizer that scales itself by ``kappa``, batch size / base batch size."""

    kappa: float


class ProgressiveScaling:
    """SGD with Progressive Scaling (Busbridge et al. 2023, Algorithm 1; its body is reconstructed).

    In epoch ``e`` it sets ``kappa = B_e / B`` on the optimizer, which scales everything by it;
    moments, averages and the positions of schedules continue. It works like a learning-rate
    scheduler, and together with one: make it after the optimizer, which sets the first ``kappa``,
    and call ``step()`` after each epoch. The training loop reads :attr:`batch_size` to draw the
    batches.

    Args:
        optimizer: an optimizer with the same ``kappa`` in all its param groups, which this
            modifies; a framework's wrapper around one too.
        base_batch_size: the batch size of the base hyper-parameters, ``> 0``. All batch sizes here
            are over all processes.
        batch_sizes: the batch size from each epoch on, as in ``{0: 4096, 60: 24576}``; keys are
            ints ``>= 0``, one of them 0.
        unit: the unit of the keys: ``"epochs"``, or ``"samples"`` seen.

    Attributes:
        position: number of epochs done, or of samples seen.

    Raises:
        TypeError: ``optimizer`` has no ``kappa``.
        ValueError: a key, a batch size or the unit is bad, or the param groups differ in ``kappa``
            or cannot follow one of the batch sizes. The optimizer is unchanged then.
    """

    def __init__(
        self,
        optimizer: Scaled,
        base_batch_size: float,
        batch_sizes: Mapping[int, float],
        *,
        unit: str = "epochs",
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} is not known; allowed: 'epochs', 'samples'")
        optimizer = unwrapped(optimizer)
        if not hasattr(optimizer, "kappa"):  # raises ValueError if the groups differ
            raise TypeError(f"optimizer: received a {type(optimizer).__name__}; it has no kappa")
        check_range("base_batch_size", base_batch_size, 0, math.inf, ends=("<", "<"))
        _check_batch_sizes(batch_sizes)
        self.unit = unit
        self.base_batch_size = base_batch_size
        self.batch_sizes = dict(sorted(batch_sizes.items()))
        self.position = 0
        self._optimizer = optimizer
        self._check_reachable()
        optimizer.kappa = self.kappa

    @property
    def batch_size(self) -> float:
        """Batch size at the present position, over all processes."""
        return self._batch_size_at(self.position)

    @property
    def kappa(self) -> float:
        """``batch_size / base_batch_size`` at the present position."""
        return self.batch_size / self.base_batch_size

    def step(self, samples: int | None = None) -> None:
        """Advance by an epoch, or by ``samples``; sets the optimizer's ``kappa`` at a change.

        Args:
            samples: with ``unit="samples"``, the number of samples seen since the last call,
                ``>= 0``; not given with ``unit="epochs"``.

        Raises:
            ValueError: ``samples`` does not match the unit, or the optimizer's param groups cannot
                follow the next ``kappa``. Nothing changes then.
        """
        if (samples is None) != (self.unit == "epochs"):
            wanted = "a count >= 0" if self.unit == "samples" else "None, a call is an epoch"
            raise ValueError(f"samples={samples!r} with unit={self.unit!r}; allowed: {wanted}")
        position = self.position + _count("samples", 1 if samples is None else samples)
        if self._batch_size_at(position) != self.batch_size:
            self._optimizer.kappa = self._batch_size_at(position) / self.base_batch_size
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        """Return position and unit; batch sizes are configuration, and may change on resuming."""
        return {"unit": self.unit, "position": self.position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue at a saved position; sets the optimizer's ``kappa``: load the optimizer first.

        Raises:
            ValueError: the saved unit differs, the position is not a count, or the optimizer's
                param groups cannot follow. Nothing changes then.
        """
        if state_dict["unit"] != self.unit:
            raise ValueError(f"state_dict: unit={state_dict['unit']!r}; allowed: {self.unit!r}")
        position = _count("state_dict: position", state_dict["position"])
        self._optimizer.kappa = self._batch_size_at(position) / self.base_batch_size
        self.position = position

    def _batch_size_at(self, position: int) -> float:
        return self.batch_sizes[max(start for start in self.batch_sizes if start <= position)]

    def _check_reachable(self) -> None:
        """Let the optimizer refuse a batch size now rather than during training."""
        before = self._optimizer.kappa
        try:
            for batch_size in self.batch_sizes.values():
                self._optimizer.kappa = batch_size / self.base_batch_size
        finally:
            self._optimizer.kappa = before


def _check_batch_sizes(batch_sizes: Mapping[int, float]) -> None:
    for start, batch_size in batch_sizes.items():
        _count("batch_sizes: key", start)
        check_range(f"batch_sizes[{start}]", batch_size, 0, math.inf, ends=("<", "<"))
    if 0 not in batch_sizes:
        raise ValueError(
            f"batch_sizes={dict(batch_sizes)!r} has none for the start; allowed: a key 0"
        )


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r} is out of range; allowed: an int >= 0")
    return value
