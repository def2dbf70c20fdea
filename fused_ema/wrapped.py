"""Optimizers inside the wrappers of training frameworks (Lightning, Fabric, accelerate).

Such a wrapper holds the optimizer in ``.optimizer``. Some wrappers also take the optimizer's class,
so that its methods would run on the wrapper; those are forwarded.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

# What a GradScaler reads and sets on an optimizer.
AMP = ("grad_scale", "found_inf", "_step_supports_amp_scaling")


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside any number of wrappers; one without a wrapper is returned as it is."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class Forwarded:
    """An attribute of a wrapper's class that is in fact the one of the optimizer inside."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper.optimizer, self._name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        setattr(wrapper.optimizer, self._name, value)

    def __delete__(self, wrapper: Any) -> None:
        delattr(wrapper.optimizer, self._name)


def forward(wrapper: type, optimizer: type[Optimizer]) -> None:
    """Let a wrapper's class forward the public attributes that it inherits from the optimizer's.

    Args:
        wrapper: a class whose instances hold the optimizer in ``.optimizer``; modified.
        optimizer: the optimizer's class, one of the wrapper's bases.
    """
    for name in AMP:
        setattr(wrapper, name, Forwarded(name))
    for name in dir(wrapper):
        first = next(cls for cls in wrapper.__mro__ if name in vars(cls))
        if not name.startswith("_") and first in optimizer.__mro__:
            setattr(wrapper, name, Forwarded(name))
