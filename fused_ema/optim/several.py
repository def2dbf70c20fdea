"""The average of a model that several optimizers train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..ema import modules
from ..ema.teacher import named
from ..wrapped import unwrapped
from .base import FusedScaledOptimizer


def ema_state_dict(
    model: nn.Module, optimizers: Iterable[FusedScaledOptimizer], index: int = 0
) -> dict[str, Tensor]:
    """Return the averages of several optimizers under the keys of ``model.state_dict()``.

    Use it if several optimizers divide a model's parameters: one takes the matrices and another the
    rest, or each parameter has its own optimizer, stepped in the backward pass. (Their
    ``ema_weights()`` contexts nest, in a ``contextlib.ExitStack`` if there are many.)

    Args:
        model: the module whose parameters are optimized. Entries without an average are its own.
        optimizers: fused optimizers and :class:`~fused_ema.FusedEMA`, in any order, with or without
            a framework's wrapper. Those without an average ``index`` add nothing. If several hold
            the same buffer, the first one's is used.
        index: which average, for optimizers with a tuple ``ema_decay``.

    Returns:
        A state dict as from :meth:`~fused_ema.FusedScaledOptimizer.ema_state_dict` of one
        optimizer.

    Raises:
        TypeError: an entry of ``optimizers`` is not from this package.
        ValueError: two optimizers average the same parameter, which the message names, or ``model``
            holds none of the averaged parameters.
        IndexError: none has such an average.
        RuntimeError: inside the ``ema_weights()`` of one of them.
    """
    averaged: dict[Tensor, Tensor] = {}
    buffers: dict[Tensor, Tensor] = {}
    given = [unwrapped(optimizer) for optimizer in optimizers]
    for i, optimizer in enumerate(given):
        if not isinstance(optimizer, FusedScaledOptimizer):
            raise TypeError(
                f"optimizers: entry {i} is a {type(optimizer).__name__}; allowed: optimizers of "
                "this package, or FusedEMA(<another optimizer>)"
            )
    having = [optimizer for optimizer in given if optimizer._groups_with(index)]
    if not having:
        without = given and all(optimizer._num_emas() == 0 for optimizer in given)
        why = "they were made without ema_decay" if without else "see ema_decay"
        raise IndexError(f"index={index}: no optimizer has that average; {why}")
    for optimizer in having:
        optimizer._check_not_swapped("ema_state_dict()")
        part = optimizer._averages(index)
        optimizer._warn_of_young("ema_state_dict()", index)
        twice = next((param for param in part if param in averaged), None)
        if twice is not None:
            name = named(model).get(twice)
            what = repr(name) if name else f"of shape {tuple(twice.shape)}, not in model"
            raise ValueError(f"optimizers: two of them average the parameter {what}")
        averaged |= part
        for buffer, held in optimizer._averaged_buffers(index).items():
            if held is not buffer:
                buffers.setdefault(buffer, held)
    return modules.state_dict(model, averaged, buffers)
