"""Converts the numbers of a param group to Python's own.

Numbers of numpy and of the standard library's other types, and sequences of any kind (OmegaConf's
lists, arrays, tensors), are converted on entry, so that a state dict holds nothing that torch's
safe unpickler refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from torch import Tensor

SIMPLE = {float, int, bool, str, type(None)}
# Fields that may hold several numbers.
SEVERAL = ("betas", "ema_decay")
# Fields that hold no values.
MEMBERS = ("params", "param_names")


def as_given(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group with Python's numbers, and tuples or lists of them.

    Tensors, schedules and everything that is not a number stay as they are.
    """
    return {k: v if k in MEMBERS else field(k, v) for k, v in group.items()}


def field(name: str, value: Any) -> Any:
    """One field's value, see :func:`as_given`."""
    if type(value) in SIMPLE:
        return value
    return several(value) if name in SEVERAL else number(value)


def number(value: Any) -> Any:
    """A number as an int, float or bool; anything else as it is, including tensors."""
    if type(value) in SIMPLE or isinstance(value, Tensor):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        return float(value)
    # numpy's bools, and arrays of one element
    return value.item() if getattr(value, "size", None) == 1 and hasattr(value, "item") else value


def several(value: Any) -> Any:
    """A tuple of numbers from any iterable of them; a single number or schedule as it is.

    A list whose entries need no conversion stays as it is too, so that later writes to it count.
    """
    if type(value) is list and all(type(v) in SIMPLE or isinstance(v, Tensor) for v in value):
        return value
    if isinstance(value, Tensor):
        return value.unbind() if value.dim() == 1 and len(value) != 1 else value
    alone = callable(value) or isinstance(value, str | bytes | Mapping | Set)
    if alone or getattr(value, "ndim", 1) == 0 or not isinstance(value, Iterable):
        return number(value)
    return tuple(map(number, value))
