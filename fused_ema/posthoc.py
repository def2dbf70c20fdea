"""Post-hoc EMA: an average of any length, computed after training from tracked averages.

Karras et al. 2024 (arXiv 2312.02696, section 3.2): training stores snapshots of averages with
:class:`~fused_ema.ema.decay.PowerDecay` now and then; a weighted sum of them fits the wanted
averaging profile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .checks import check_range
from .dtypes import widest


def solve_weights(
    times: Sequence[float], gammas: Sequence[float], t: float, gamma: float
) -> list[float]:
    """Coefficients with which stored power-function averages sum to the one of ``gamma`` at ``t``.

    They are the least-squares fit between averaging profiles
    ``(gamma + 1) * tau**gamma / t**(gamma + 1)``, ``0 <= tau <= t`` (Equation 121), from the normal
    equations of their inner products (Algorithm 3, in float64), divided by their sum, so that
    constant values stay as they are.

    Args:
        times: the time at which each average was stored, in base steps or samples, ``> 0``.
        gammas: each average's exponent, ``0 <= gamma < inf``.
        t: the end of the wanted average, in the unit of ``times``, at most the latest of them.
        gamma: the wanted exponent, ``0 <= gamma < inf``.

    Returns:
        A coefficient for each stored average, of either sign; they sum to 1.

    Raises:
        ValueError: an argument is out of its range, or the numbers of times and exponents differ.
    """
    if len(times) != len(gammas) or not times:
        raise ValueError(
            f"gammas has {len(gammas)} entries, times has {len(times)}; allowed: one for each, "
            "at least one"
        )
    for stored, exponent in zip(times, gammas, strict=True):
        check_range("times", stored, 0.0, math.inf, ends=("<", "<"))
        check_range("gammas", exponent, 0.0, math.inf, ends=("<=", "<"))
    check_range("t", t, 0.0, max(times), ends=("<", "<="))
    check_range("gamma", gamma, 0.0, math.inf, ends=("<=", "<"))
    ends = torch.tensor(times, dtype=torch.float64, device="cpu")
    exponents = torch.tensor(gammas, dtype=torch.float64, device="cpu")
    gram = inner_product(ends[:, None], exponents[:, None], ends, exponents)
    target = inner_product(ends, exponents, ends.new_tensor(t), ends.new_tensor(gamma))
    # profiles of unit norm, and no inverse: neighbours are nearly dependent, equal ones exactly
    norms = gram.diagonal() ** 0.5
    fit = torch.linalg.lstsq(
        gram / norms.outer(norms), (target / norms)[:, None], driver="gelsd"
    ).solution
    weights = fit[:, 0] / norms
    result: list[float] = (weights / weights.sum()).tolist()
    return result


def inner_product(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """Integral over ``tau`` of the product of two averaging profiles (Equation 151).

    ``(gamma_a + 1)*(gamma_b + 1)/(gamma_a + gamma_b + 1) * (earlier/later)**g / later``, where
    ``g`` is the exponent of the profile that ends later.

    Args:
        t_a, t_b: ends of the profiles, ``> 0``; float64, shapes that broadcast.
        gamma_a, gamma_b: their exponents, ``>= 0``, likewise.
    """
    earlier, later = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    exponent = torch.where(t_a < t_b, gamma_b, gamma_a)
    factor = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0)
    return factor * (earlier / later) ** exponent / later


@torch.no_grad()
def reconstruct(snapshots: Iterable[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """Return ``sum(weight * snapshot)`` over state dicts: the fitted average (section 3.2).

    Floating and complex tensors are summed in float64 (float32 on Apple's GPUs) and rounded to
    their dtype once. So are buffers; it is better to compute BatchNorm's statistics again.
    Everything else comes from the last snapshot. Values that are equal in all snapshots stay so,
    bit for bit if the weights sum to 1. An infinity counts by the sum of its weights, and opposite
    infinities have no average (NaN).

    Args:
        snapshots: state dicts of the same keys, shapes and dtypes, such as copies of
            ``optimizer.ema_state_dict(model)``; a generator can load them one by one.
        weights: the coefficient of each snapshot, in their order, as from :func:`solve_weights`.

    Returns:
        A state dict whose sums are in new memory.

    Raises:
        ValueError: snapshots differ in a key, shape or dtype, or their number is not that of
            ``weights``.
    """
    sums: dict[str, _Sum] = {}
    last: Mapping[str, Any] | None = None
    for index, (snapshot, weight) in enumerate(zip_longest(snapshots, weights)):
        if snapshot is None or weight is None:
            raise ValueError(f"weights has {len(weights)} entries; allowed: one for each snapshot")
        if last is not None:
            _check_alike(snapshot, last, index)
        for key, value in snapshot.items():
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                if key not in sums:
                    sums[key] = _Sum(value)
                sums[key].add(value, weight)
        last = snapshot
    if last is None:
        raise ValueError("snapshots is empty; allowed: at least one state dict")
    total = math.fsum(weights)
    rounding = 2.0**-52 * math.fsum(map(abs, weights))
    total = 1.0 if abs(total - 1.0) <= rounding else total
    return {
        key: sums[key].rounded(total, value) if key in sums else value
        for key, value in last.items()
    }


class _Sum:
    """``sum(weight * value)`` as ``first * sum(weight) + sum(weight * (value - first))``.

    So values that are all equal stay as they are. Infinities are taken as 0, and their weights are
    summed separately.

    Args:
        first: a tensor like the values; the first of them, if equal values should stay as they are.
    """

    def __init__(self, first: Tensor) -> None:
        self._first = _without_infinities(_real(first)).clone()
        # scales float64 values down, so that differences cannot overflow
        self._unit = 2.0**-8 if self._first.dtype == torch.float64 else 1.0
        self._wide = widest(first.device)
        self._sum = torch.zeros_like(self._first, dtype=self._wide)
        self._infinite: dict[float, Tensor] = {}

    def add(self, value: Tensor, weight: float) -> None:
        """Add ``weight * value``; add nothing if the weight is 0."""
        if weight == 0.0:
            return
        value = _real(value)
        for infinity in (math.inf, -math.inf):
            found = value == infinity
            if found.any():
                counted = self._infinite.setdefault(infinity, torch.zeros_like(self._sum))
                counted.add_(found, alpha=weight)
        finite = _without_infinities(value)
        change = finite.to(self._wide) * self._unit - self._first.to(self._wide) * self._unit
        self._sum.add_(torch.where(finite == self._first, 0.0, change), alpha=weight)

    def rounded(self, total: float, like: Tensor) -> Tensor:
        """The sum in the dtype and shape of ``like``, for weights whose sum is ``total``."""
        first = self._first.to(self._wide)
        summed = (first * (self._unit * total) + self._sum) / self._unit
        summed = torch.where(self._sum == 0.0, first * total, summed)
        for infinity, weight in self._infinite.items():
            summed = summed + torch.where(weight != 0.0, infinity * weight, 0.0)
        return (
            torch.view_as_complex(summed).to(like.dtype)
            if like.is_complex()
            else summed.to(like.dtype)
        )


def _without_infinities(value: Tensor) -> Tensor:
    return torch.where(value.isinf(), 0.0, value)


def _real(value: Tensor) -> Tensor:
    """A real tensor itself, or a complex one as pairs of reals."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _check_alike(snapshot: Mapping[str, Any], other: Mapping[str, Any], index: int) -> None:
    differing = sorted(snapshot.keys() ^ other.keys())
    if differing:
        key = differing[0]
        which = "lacks" if key in other else "alone has"
        raise ValueError(f"snapshots[{index}] {which} {key!r}; allowed: the same keys in all")
    for key, value in snapshot.items():
        if _layout(value) != _layout(other[key]):
            raise ValueError(
                f"snapshots[{index}][{key!r}] is {_layout(value)}, in the one before "
                f"{_layout(other[key])}; allowed: the same in all"
            )


def _layout(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else "no tensor"
