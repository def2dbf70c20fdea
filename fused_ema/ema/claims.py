"""Decides which of several optimizers moves the buffers of the teacher that they share."""

from __future__ import annotations

import weakref

from torch import nn


class Claim:
    """The claim to one teacher's buffers, which one optimizer moves once a step.

    The first optimizer to step moves them. Another optimizer takes over if that one is gone, or has
    not moved them between two steps of the new one.
    """

    def __init__(self) -> None:
        self._owner: weakref.ref[object] | None = None
        self._waiting: weakref.WeakSet[object] = weakref.WeakSet()

    def moves(self, keeper: object) -> bool:
        """Whether ``keeper`` moves the buffers at its current step."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None and owner is not keeper and keeper not in self._waiting:
            self._waiting.add(keeper)
            return False
        self._owner = weakref.ref(keeper)
        self._waiting.clear()
        return True


_claims: weakref.WeakKeyDictionary[nn.Module, Claim] = weakref.WeakKeyDictionary()


def claim(teacher: nn.Module) -> Claim:
    """The one claim to a teacher's buffers, shared by all callers."""
    return _claims.setdefault(teacher, Claim())
