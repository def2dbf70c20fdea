"""Calls that are made all, or none: what an interrupt must not divide."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

Call: TypeAlias = "partial[Any]"


def together(calls: Iterable[Call]) -> None:
    """Make calls, one behind the other.

    Python runs signal handlers between lines of Python: where all calls are of C functions, no
    handler, and so no KeyboardInterrupt, comes between them.
    """
    deque(map(partial.__call__, list(calls)), maxlen=0)
