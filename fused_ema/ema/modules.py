"""Puts an average into the form of a module: a state dict, or values of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import sharding
from ..dtypes import weight_of
from ..names import renamed
from . import formats
from .averages import differences
from .teacher import check_shape, pair


def state_dict(
    model: nn.Module, averages: Mapping[Tensor, Tensor], buffers: Mapping[Tensor, Tensor]
) -> dict[str, Tensor]:
    """``model.state_dict()`` with averages in place of the parameters.

    Args:
        model: the module that holds the parameters.
        averages: the average of each parameter.
        buffers: the averaged buffer for each buffer.

    Raises:
        ValueError: ``model`` holds none of the parameters.
    """
    result: dict[str, Tensor] = {}
    found = False
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or is_lazy(value):
            result[key] = value
            continue
        found = found or value in averages
        result[key] = averages.get(value, buffers.get(value, value)).detach()
    if averages and not found:
        raise ValueError("model holds none of the optimizer's averaged parameters")
    return result


@torch.no_grad()
def copy_to(
    target: nn.Module,
    averages: Mapping[Tensor, Tensor],
    unaveraged: Iterable[Tensor],
    names: Mapping[Tensor, str],
    in_order: bool,
    buffers: Mapping[str, tuple[Tensor, Tensor]] | None,
) -> None:
    """Copy averages into the module's parameters and ``buffers`` into its buffers, in place.

    Args:
        target: the module that holds the parameters, a part of it, or another of the same shapes.
        averages: the average of each parameter.
        unaveraged: the optimizer's other parameters; another module takes them as they are.
        names: the parameters' names, as far as known.
        in_order: whether ``averages`` may be in the order of a module's parameters.
        buffers: the student's buffers by name, each with the averaged model's value for it; None
            leaves the target's as they are.

    Raises:
        ValueError: a name or shape does not match, a buffer that the target saves has no
            counterpart, or a tensor cannot be written to; nothing has been copied.
    """
    own: set[Tensor] = {*target.parameters(), *target.buffers()}
    if not averages or not own.isdisjoint(averages):
        held = dict((buffers or {}).values())
        copies = [(tensor, value) for tensor, value in averages.items() if tensor in own]
        copies += [(tensor, value) for tensor, value in held.items() if tensor in own]
    else:
        copies = _to_another(target, averages, unaveraged, names, in_order)
        copies += [] if buffers is None else _buffers_to_another(target, buffers)
    copies = [(tensor, value) for tensor, value in copies if tensor is not value]
    for tensor, value in copies:
        _check_written(tensor, value)
    for tensor, value in copies:
        sharding.copy(tensor, value)


def _check_written(tensor: Tensor, value: Tensor) -> None:
    kinds = {"on the meta device": tensor.is_meta and not value.is_meta}
    kinds["of elements that share memory"] = sharding.repeats(sharding.local(tensor))
    for kind, it_is in kinds.items():
        if it_is:
            raise ValueError(
                f"copy_ema_to(): the module has a tensor of shape {tuple(tensor.shape)} {kind}; "
                "allowed: tensors that can be written to"
            )


def _to_another(
    target: nn.Module,
    averages: Mapping[Tensor, Tensor],
    unaveraged: Iterable[Tensor],
    names: Mapping[Tensor, str],
    in_order: bool,
) -> list[tuple[Tensor, Tensor]]:
    pairs = pair(target, list(averages), names, in_order, check_shape)
    copies = [(tensor, averages[param]) for param, tensor in pairs.items()]
    rest = renamed(dict(target.named_parameters()), names.values())
    for param in unaveraged:
        tensor = rest.get(names.get(param, ""))
        if tensor is not None:
            check_shape(tensor, param, repr(names[param]))
            copies.append((tensor, param.detach()))
    return copies


def _buffers_to_another(
    target: nn.Module, buffers: Mapping[str, tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    saved = {v for v in target.state_dict(keep_vars=True).values() if isinstance(v, Tensor)}
    copies = []
    for name, tensor in renamed(dict(target.named_buffers()), buffers).items():
        _, value = buffers.get(name, (None, None))
        if value is not None and value.shape == tensor.shape:
            copies.append((tensor, value))
        elif tensor in saved and value is not None:
            raise ValueError(
                f"copy_ema_to(): the buffer {name!r} has shape {tuple(tensor.shape)}; allowed: the "
                f"student's {tuple(value.shape)}, or buffers=False"
            )
        elif tensor in saved:
            raise ValueError(
                f"copy_ema_to(): the module has the buffer {name!r}, and no such buffer of the "
                "student is known; pass model=<the student module> to the optimizer, call "
                "load_state_dict(opt.ema_state_dict(<the student module>)) on the module instead, "
                "or pass buffers=False to leave its buffers as they are"
            )
    return copies


class Rewrite:
    """Replaces a parameter's weights from outside, and adjusts the state that depends on them.

    A master takes the new weights. An average that is stored as a difference keeps its value, so
    that its difference changes.

    Args:
        param: the parameter whose value is about to be replaced.
        value: its new value.
        state: the parameter's state, which :meth:`finish` modifies in place.

    Raises:
        ValueError: an average is too far from the new weights to be stored as a difference.
    """

    def __init__(self, param: Tensor, value: Tensor, state: Mapping[str, Any]) -> None:
        self._param = param
        self._value = value
        self._state = state
        held = weight_of(param, state)
        self._averages = {key: formats.average(state[key], held) for key in differences(state)}
        for average in self._averages.values():
            formats.check_distance("copy_ema_to(): an average", average, value)

    @torch.no_grad()
    def finish(self) -> None:
        """Adjust the state; call it when the parameter has its new value."""
        if "master" in self._state:
            self._state["master"].copy_(self._value)
        weight = weight_of(self._param, self._state)
        for key, average in self._averages.items():
            self._state[key].copy_(formats.stored(average, weight, "delta"))
