"""An average as a module sees it: a state dict, or copied into parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import sharding
from .state import check_shape
from .teacher import pair


def state_dict(
    model: nn.Module, averages: Mapping[Tensor, Tensor], buffers: Mapping[Tensor, Tensor]
) -> dict[str, Tensor]:
    """``model.state_dict()`` with averages in the place of the parameters they belong to.

    Args:
        model: the module that holds the parameters.
        averages: average of each parameter.
        buffers: held buffer of each buffer.

    Raises:
        ValueError: ``model`` holds none of the parameters.
    """
    result: dict[str, Tensor] = {}
    found = False
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            result[key] = value
            continue
        found = found or value in averages
        result[key] = averages.get(value, buffers.get(value, value)).detach()
    if not found:
        raise ValueError("model holds none of the optimizer's averaged parameters")
    return result


@torch.no_grad()
def copy_to(
    model: nn.Module,
    averages: Mapping[Tensor, Tensor],
    buffers: Mapping[Tensor, Tensor],
    names: Mapping[Tensor, str],
    in_order: bool,
) -> None:
    """Copy averages into the module's parameters and ``buffers`` into its buffers, in place.

    Args:
        model: the module that holds the parameters, a part of it, or another of the same shapes.
        averages: average of each parameter.
        buffers: what the averaged model has in the place of each buffer.
        names: the parameters' and buffers' names, as far as known.
        in_order: whether ``averages`` may be in a module's own order.

    Raises:
        ValueError: a name or shape does not match; nothing has been copied.
    """
    own: set[Tensor] = set(model.parameters())
    if own.isdisjoint(averages):
        targets = pair(model, list(averages), names, in_order, check_shape)
        theirs = dict(model.named_buffers())
        targets |= {b: theirs[names[b]] for b in buffers if names.get(b) in theirs}
    else:
        own.update(model.buffers())
        targets = {tensor: tensor for tensor in (*averages, *buffers) if tensor in own}
    for tensor, target in targets.items():
        sharding.copy(target, averages[tensor] if tensor in averages else buffers[tensor])
