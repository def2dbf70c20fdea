"""Range checks whose errors name the argument, what was received and what is allowed."""

from __future__ import annotations

import math
from typing import Any


def check_range(
    name: str, value: Any, low: float, high: float, *, ends: tuple[str, str] = ("<=", "<=")
) -> None:
    """Raise ValueError unless ``low <= value <= high``; ``ends`` chooses ``<`` or ``<=``.

    NaN and values that are not numbers never pass. A tensor on a device always passes, because
    reading it would wait for the device.
    """
    if not getattr(value, "is_cpu", True):
        return
    what = "out of range"
    try:
        at_end = (value == low and ends[0] == "<") or (value == high and ends[1] == "<")
        if low <= value <= high and not at_end:
            return
    except (TypeError, ValueError, RuntimeError):
        what = "not a number"
    allowed = f"{low} {ends[0]} {name} {ends[1]} {high}"
    raise ValueError(f"{name}={value!r} is {what}; allowed: {allowed}")


def check_kappa(kappa: Any) -> None:
    """Raise ValueError unless ``kappa`` is finite and positive."""
    check_range("kappa", kappa, 0, math.inf, ends=("<", "<"))


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless ``value`` is one of the strings of a ``Literal``."""
    allowed = choices.__args__  # typing.get_args() takes several calls of Python functions
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")
