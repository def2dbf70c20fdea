"""Makes several calls without an interrupt between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeAlias

Call: TypeAlias = "partial[Any]"


def together(calls: Iterable[Call]) -> None:
    """Make the calls one after another.

    Python runs signal handlers between Python instructions. If all calls are of C functions, no
    handler, and so no KeyboardInterrupt, comes between them.
    """
    deque(map(partial.__call__, list(calls)), maxlen=0)
