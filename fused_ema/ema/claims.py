"""Which of several optimizers moves the buffers of a teacher that they share."""

from __future__ import annotations

import weakref

from torch import nn


class Claim:
    """One teacher's buffers: moved once a step, by one of those that keep them.

    The first to step moves them. Another takes over where that one is gone, or has not moved them
    between two steps of its own.
    """

    def __init__(self) -> None:
        self._owner: weakref.ref[object] | None = None
        self._waiting: weakref.WeakSet[object] = weakref.WeakSet()

    def moves(self, keeper: object) -> bool:
        """Whether ``keeper`` moves the buffers at the step that it takes."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None and owner is not keeper and keeper not in self._waiting:
            self._waiting.add(keeper)
            return False
        self._owner = weakref.ref(keeper)
        self._waiting.clear()
        return True


_claims: weakref.WeakKeyDictionary[nn.Module, Claim] = weakref.WeakKeyDictionary()


def claim(teacher: nn.Module) -> Claim:
    """The claim to a teacher's buffers, the same for all that ask."""
    return _claims.setdefault(teacher, Claim())
