"""Functions of a real (a Python float or a float64 tensor), so that each rule is written once.

On floats they are those of :mod:`math`, with limits instead of domain errors. On tensors they run
on the tensor's device, which is how scalars are folded there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch import Tensor

Real = TypeVar("Real", float, "Tensor")


def _is_number(x: object) -> TypeIs[float]:
    """Whether ``x`` is a Python or numpy number, not a tensor."""
    return not hasattr(x, "is_cpu")


def log(x: Real) -> Real:
    """Natural logarithm; ``-inf`` at 0."""
    if _is_number(x):
        return math.log(x) if x > 0.0 else -math.inf
    return x.log()


def log1p(x: Real) -> Real:
    """``log(1 + x)``; ``-inf`` from -1 down."""
    if _is_number(x):
        return math.log1p(x) if x > -1.0 else -math.inf
    return x.clamp(min=-1.0).log1p()


def expm1(x: Real) -> Real:
    """``exp(x) - 1`` without cancellation."""
    return math.expm1(x) if _is_number(x) else x.expm1()


def sqrt(x: Real) -> Real:
    """Square root, correctly rounded."""
    return math.sqrt(x) if _is_number(x) else x.sqrt()


def power(x: Real, y: Any) -> Real:
    """``x**y``; ``y`` may be a float beside a tensor."""
    if _is_number(x) and _is_number(y):
        return float(x**y)
    result: Real = x**y
    return result


def cos(x: Real) -> Real:
    """Cosine of radians."""
    return math.cos(x) if _is_number(x) else x.cos()


def exp(x: Real) -> Real:
    """``e**x``."""
    return math.exp(x) if _is_number(x) else x.exp()


def ceil(x: Real) -> Real:
    """The smallest whole number that is not below ``x``."""
    return float(math.ceil(x)) if _is_number(x) else x.ceil()


def at_most(x: Real, limit: Any) -> Real:
    """The smaller of both; ``limit`` may be a float beside a tensor."""
    if _is_number(x):
        return x if x <= limit else float(limit)
    return x.clamp(max=limit)


def at_least(x: Real, limit: float) -> Real:
    """The larger of both."""
    return max(x, limit) if _is_number(x) else x.clamp(min=limit)


def where(condition: Any, yes: Any, no: Real) -> Real:
    """``yes`` where ``condition`` holds, else ``no``; ``yes`` may be a float beside a tensor."""
    if _is_number(condition):
        chosen: Real = yes if condition else no
        return chosen
    tensor: Any = no
    result: Real = tensor.where(~condition, yes)
    return result


def surely(condition: Any) -> bool:
    """Whether a condition holds as far as the host knows; it does not wait for a device's."""
    return _is_number(condition) and bool(condition)
