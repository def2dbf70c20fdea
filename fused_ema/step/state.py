"""Optimizer state of one parameter: created, moved beside its parameter, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import sharding
from ..dtypes import COMPUTE_DTYPE, beside, is_fixed, widest
from ..ema import averages, formats
from ..ema.averages import differences, full
from ..ema.decay import decays, ema_keys
from ..rules.rule import Rule
from .buckets import is_active, wants_master


def ensure(
    rule: Rule,
    group: Mapping[str, Any],
    param: Tensor,
    state: dict[str, Any],
    teacher: Tensor | None = None,
) -> None:
    """Give ``state`` all that a step needs, in place: what is there already keeps its values.

    Moments start at zero in the parameter's dtype, as in torch, in its master's or, where they are
    rounded, in bfloat16; a master and
    averages start as a copy of the weights in the compute dtype, the first average is ``teacher``
    where there is one; ``step`` counts base steps (``kappa`` a step) in float64, on the parameter's
    device if the group is capturable, else on the CPU. Tensors left behind by ``model.to(...)``
    follow their parameter, a teacher never does. A master and what belongs to it stay while the
    parameter is frozen.

    Raises:
        TypeError: see :func:`check_param`.
        RuntimeError: a state has another shape than its parameter.
        ValueError: the teacher does not fit the parameter.
    """
    emas = ema_keys(len(decays(group["ema_decay"])))
    if is_fixed(param):
        return
    if not wants_master(group, param):
        drop_master(state)
    active = is_active(rule, param, state)
    if param.dtype not in COMPUTE_DTYPE and not active and not emas:
        return  # another optimizer's, and nothing of it is averaged
    check_param(param, active)
    if active:
        _check_rounded_states(group, param)
        _ensure_rule_states(rule.states(group), param, state, state_dtype(group, param))
        if wants_master(group, param):
            state["master"] = _master(state.get("master"), param)
    state["step"] = counter(state.get("step", 0.0), counter_device(group, param), "state 'step'")
    averages.ensure(emas, param, state, group, teacher)


def check_param(param: Tensor, written: bool) -> None:
    """Raise unless a parameter's memory can be averaged and, if it is ``written``, stepped.

    Raises:
        TypeError: its dtype is not a floating one, or it is a view that is not resolved.
        RuntimeError: it would be written, and elements of it share memory.
    """
    if param.dtype not in COMPUTE_DTYPE:
        allowed = ", ".join(map(str, COMPUTE_DTYPE))
        raise TypeError(
            f"params: a parameter that requires grad has dtype {param.dtype}; allowed: {allowed}, "
            "or requires_grad=False, which keeps it and its average as they are"
        )
    if param.is_conj() or param.is_neg():
        raise TypeError("params: a parameter is a lazily conjugated or negated view; resolve it")
    if written and sharding.repeats(sharding.local(param)):
        raise RuntimeError(
            f"params: elements of a parameter of shape {tuple(param.shape)} share memory (strides "
            f"{param.stride()}); allowed: memory of its own for each; clone() it"
        )


def drop_master(state: dict[str, Any]) -> None:
    """Forget the weights that the optimizer held: the parameter's own go on."""
    master = state.pop("master", None)
    if master is None:
        return
    for key in differences(state):
        state[key] = full(state[key], master)


def _master(held: Tensor | None, param: Tensor) -> Tensor:
    dtype = COMPUTE_DTYPE[param.dtype]
    if held is None:
        return param.detach().to(dtype, copy=True)
    return beside(held, param, dtype, "master")


def weight_dtype(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """Dtype of what the rule steps."""
    return COMPUTE_DTYPE[param.dtype] if wants_master(group, param) else param.dtype


def state_dtype(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """Dtype of the rule's states."""
    form = group["state_format"]
    return weight_dtype(group, param) if form == "full" else formats.DTYPES[form]


def _check_rounded_states(group: Mapping[str, Any], param: Tensor) -> None:
    dtype = weight_dtype(group, param)
    if group["state_format"] != "full" and dtype != torch.float32:
        raise TypeError(
            f"state_format={group['state_format']!r}: a parameter has dtype {dtype}; allowed: "
            "float32 parameters, or bfloat16 and float16 ones with master_weights=True"
        )


def _ensure_rule_states(
    keys: tuple[str, ...], param: Tensor, state: dict[str, Any], dtype: torch.dtype
) -> None:
    fresh = all(state.get(key) is None for key in keys)
    if keys and "step" not in state:
        # torch's SGD keeps no count; a buffer that exists has seen at least one gradient
        state["step"] = 0.0 if fresh else 1.0
    elif keys and fresh:
        state["step"] = 0.0
    for key in keys:
        if state.get(key) is None:
            state[key] = torch.zeros_like(param, dtype=dtype).detach()
        else:
            state[key] = beside(state[key], param, dtype, key)


def reset(rule: Rule, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Zero one parameter's states of the rule and their count, in place: plans hold them."""
    for key in (*rule.states(group), "step"):
        if isinstance(state.get(key), Tensor):
            state[key].zero_()


def counter_device(group: Mapping[str, Any], param: Tensor) -> torch.device:
    """Where base steps are counted: a captured graph can only count on the device."""
    return param.device if group.get("capturable") else torch.device("cpu")


def counter(value: Any, device: torch.device, name: str) -> Tensor:
    """``value`` as a 0-dim tensor of a device's widest dtype, itself if it is one already."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise RuntimeError(f"{name} has shape {tuple(value.shape)}; allowed: one element")
    dtype = widest(device)
    if isinstance(value, Tensor) and value.dtype == dtype and value.device == device:
        return value
    return torch.tensor(float(value), dtype=dtype, device=device)
