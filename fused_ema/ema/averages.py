"""Creates, reads and converts the averages in an optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, beside, weight_of
from . import formats
from .teacher import check_teacher


def differences(state: Mapping[str, Any]) -> list[str]:
    """Names of the averages that are stored as differences to the weights."""
    return [
        key
        for key, value in state.items()
        if (key == "ema" or key.startswith("ema_"))
        and isinstance(value, Tensor)
        and value.dtype == formats.DTYPES["delta"]
    ]


def held_average(
    key: str,
    param: Tensor,
    state: Mapping[str, Any],
    teacher: Tensor | None = None,
) -> Tensor:
    """The average ``key`` of a parameter; before its first step, the weights or the teacher.

    Args:
        key: ``"ema"``, ``"ema_1"``, ...
        param: the parameter.
        state: its state, which may be empty.
        teacher: for the first average, the teacher's tensor that holds it.

    Raises:
        RuntimeError: the average has another shape than the parameter.
    """
    weight = weight_of(param, state)
    value: Tensor | None = state.get(key)
    if value is None:
        return weight if teacher is None else teacher
    if value.shape != param.shape:
        raise RuntimeError(
            f"state {key!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}"
        )
    return formats.average(value, weight)


def begin_average(
    key: str,
    param: Tensor,
    state: dict[str, Any],
    group: Mapping[str, Any],
    teacher: Tensor | None = None,
) -> None:
    """Create one average, whose values the caller is about to write.

    The arguments are those of :func:`held_average`, and the parameter's group. The first step
    creates masters and moments.
    """
    form = group["ema_format"]
    if teacher is None:
        state[key] = _average(state.get(key), weight_of(param, state), param, form, key)
    else:
        check_teacher(teacher, param, "the teacher's tensor", form)
        state[key] = teacher


def ensure(
    keys: tuple[str, ...],
    param: Tensor,
    state: dict[str, Any],
    group: Mapping[str, Any],
    teacher: Tensor | None,
) -> None:
    """Give ``state`` the averages ``keys``; those that exist keep their values.

    An average outside ``keys`` that is stored as a difference is converted to ``"full"``, because
    the weights move on without it.

    Raises:
        TypeError: the format cannot keep averages of the parameter's dtype.
        ValueError: the teacher does not fit the parameter, or an average is too far from the
            weights to be stored as a difference.
        RuntimeError: an average has another shape than the parameter.
    """
    form = group["ema_format"]
    if keys and form != "full" and COMPUTE_DTYPE[param.dtype] != torch.float32:
        raise TypeError(
            f"ema_format={form!r}: a parameter has dtype {param.dtype}; allowed: float32, bfloat16 "
            "or float16 parameters"
        )
    if keys and teacher is not None:
        check_teacher(teacher, param, "the teacher's tensor", form)
        state["ema"] = teacher
    weight = weight_of(param, state)
    for key in differences(state):
        if key not in keys:
            state[key] = full(state[key], weight)
    for key in keys:
        if teacher is None or state.get(key) is not teacher:
            state[key] = _average(state.get(key), weight, param, form, key)


def _average(value: Tensor | None, weight: Tensor, param: Tensor, form: str, key: str) -> Tensor:
    """An average as the format stores it: of ``value``, or of the weights if that is None."""
    dtype = formats.DTYPES.get(form, COMPUTE_DTYPE[param.dtype])
    if value is None:
        if form == "full":
            return weight.to(dtype, copy=True)
        return _converted(lambda value, _: value, weight, weight, form)
    if value.dtype != dtype and (form != "full" or value.dtype == formats.DTYPES["delta"]):
        # the group's format has changed, or the user has replaced the state by another dtype
        value = beside(value, param, value.dtype, key)
        if form == "delta":
            formats.check_distance(f"state {key!r}", value, weight)
        value = _converted(formats.average, value, weight, form)
    return beside(value, param, dtype, key)


def full(value: Tensor, weight: Tensor) -> Tensor:
    """The average whose difference to ``weight`` is stored, in float32."""
    return _converted(formats.average, value, weight, "full")


def _converted(read: formats.Compute, value: Tensor, weight: Tensor, form: str) -> Tensor:
    """The average ``read(value, weight)`` as the format stores it, in new memory."""
    ema = torch.empty_like(weight, dtype=formats.DTYPES.get(form, torch.float32))
    return formats.write(ema, lambda held, w: formats.stored(read(held, w), w, form), value, weight)
