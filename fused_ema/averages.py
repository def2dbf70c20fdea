"""An average as a module sees it: a state dict, or copied into parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .state import check_shape
from .teacher import pair


def state_dict(
    model: nn.Module, averages: Mapping[Tensor, Tensor], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``model.state_dict()`` with averages in the place of the parameters they belong to.

    Args:
        model: the module that holds the parameters.
        averages: average of each parameter.
        buffers: held buffers by their names in ``model``.

    Raises:
        ValueError: ``model`` holds none of the parameters.
    """
    names = {id(tensor): name for name, tensor in model.named_buffers()}
    result: dict[str, Tensor] = {}
    found = False
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            result[key] = value
            continue
        held = buffers.get(names.get(id(value), ""), value)
        found = found or value in averages
        result[key] = averages.get(value, held).detach()
    if not found:
        raise ValueError("model holds none of the optimizer's averaged parameters")
    return result


@torch.no_grad()
def copy_to(
    model: nn.Module,
    averages: Mapping[Tensor, Tensor],
    buffers: Mapping[str, Tensor],
    names: Mapping[Tensor, str],
    in_order: bool,
) -> None:
    """Copy averages into the module's parameters and ``buffers`` into its buffers, in place.

    Args:
        model: the module that holds the parameters, or one of the same shapes.
        averages: average of each parameter.
        buffers: held buffers by name.
        names: the parameters' names, as far as known.
        in_order: whether ``averages`` may be in a module's own order.

    Raises:
        ValueError: a name or shape does not match; nothing has been copied.
    """
    if any(param in averages for param in model.parameters()):
        targets = {param: param for param in averages}
    else:
        targets = pair(model, list(averages), names, in_order, check_shape)
    for param, average in averages.items():
        targets[param].copy_(average)
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
