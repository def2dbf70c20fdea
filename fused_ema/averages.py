"""An average as a module sees it: a state dict, or copied into parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import formats, sharding
from .state import check_shape, weights
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


class Rewrite:
    """Weights that are replaced from outside: all that stands for them follows.

    A master becomes the new weights. Averages that are kept as differences to the weights stay what
    they are.

    Args:
        param: its value is about to be replaced.
        value: the new one.
        state: the parameter's; its tensors are modified in place by :meth:`finish`.

    Raises:
        ValueError: an average is too far from the new weights to be kept as a difference.
    """

    def __init__(self, param: Tensor, value: Tensor, state: Mapping[str, Any]) -> None:
        self._param = param
        self._value = value
        self._state = state
        held = weights(param, state)
        self._averages = {
            key: formats.average(stored, held)
            for key, stored in state.items()
            if key.split("_")[0] == "ema" and isinstance(stored, Tensor)
            if stored.dtype == formats.DTYPES["delta"]
        }
        for average in self._averages.values():
            formats.check_distance("copy_ema_to(): an average", average, value)

    @torch.no_grad()
    def finish(self) -> None:
        """Let them follow, when the parameter has its new value."""
        if "master" in self._state:
            self._state["master"].copy_(self._value)
        weight = weights(self._param, self._state)
        for key, average in self._averages.items():
            self._state[key].copy_(formats.stored(average, weight, "delta"))
