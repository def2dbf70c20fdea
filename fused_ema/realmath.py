"""Functions of a real, a Python float or a float64 tensor, so that each rule is written once.

On floats they are :mod:`math`'s, with limits instead of domain errors. On tensors they run where
the tensor lies: that is how scalars are folded on a device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Real = TypeVar("Real", float, "Tensor")


def log(x: Real) -> Real:
    """Natural logarithm; ``-inf`` at 0."""
    if isinstance(x, float | int):
        return math.log(x) if x > 0.0 else -math.inf
    return x.log()


def log1p(x: Real) -> Real:
    """``log(1 + x)``; ``-inf`` from -1 down."""
    if isinstance(x, float | int):
        return math.log1p(x) if x > -1.0 else -math.inf
    return x.clamp(min=-1.0).log1p()


def expm1(x: Real) -> Real:
    """``exp(x) - 1`` without cancellation."""
    return math.expm1(x) if isinstance(x, float | int) else x.expm1()


def sqrt(x: Real) -> Real:
    """Square root, correctly rounded."""
    return math.sqrt(x) if isinstance(x, float | int) else x.sqrt()


def power(x: Real, y: Real) -> Real:
    """``x**y``."""
    if isinstance(x, float | int):
        return float(x**y)
    return x**y


def cos(x: Real) -> Real:
    """Cosine of radians."""
    return math.cos(x) if isinstance(x, float | int) else x.cos()


def at_most(x: Real, limit: float) -> Real:
    """The smaller of both."""
    return min(x, limit) if isinstance(x, float | int) else x.clamp(max=limit)


def where(condition: Any, yes: Any, no: Real) -> Real:
    """``yes`` where ``condition`` holds, else ``no``; ``yes`` may be a float beside a tensor."""
    if isinstance(condition, bool) or isinstance(no, float | int):
        chosen: Real = yes if condition else no
        return chosen
    return no.where(~condition, yes)


def surely(condition: Any) -> bool:
    """Whether a condition holds as far as the host can tell: one on a device is not waited for."""
    return isinstance(condition, bool) and condition
