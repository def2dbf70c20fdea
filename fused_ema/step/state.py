"""Optimizer state of one parameter: created, moved beside its parameter, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import sharding
from ..dtypes import COMPUTE_DTYPE, dense_order, is_fixed, weight_of
from ..ema import formats
from ..ema.decay import decays, ema_keys
from ..rules.rule import Rule
from .buckets import is_active, wants_master


def complete(
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
        _complete_rule_states(rule.states(group), param, state, state_dtype(group, param))
        if wants_master(group, param):
            state["master"] = _master(state.get("master"), param)
    state["step"] = counter(state.get("step", 0.0), counter_device(group, param), "state 'step'")
    form = group["ema_format"]
    if emas and form != "full" and COMPUTE_DTYPE[param.dtype] != torch.float32:
        raise TypeError(
            f"ema_format={form!r}: a parameter has dtype {param.dtype}; allowed: float32, bfloat16 "
            "or float16 parameters"
        )
    if teacher is not None and emas:
        check_teacher(teacher, param, "the teacher's tensor", form)
        state["ema"] = teacher
    weight = weight_of(param, state)
    _rest(state, weight, emas)
    for key in emas:
        if teacher is None or state.get(key) is not teacher:
            state[key] = _average(state.get(key), weight, param, form, key)


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
        state[key] = _full(state[key], master)


def differences(state: Mapping[str, Any]) -> list[str]:
    """Names of the averages that are kept as differences to the weights."""
    return [
        key
        for key, value in state.items()
        if (key == "ema" or key.startswith("ema_"))
        and isinstance(value, Tensor)
        and value.dtype == formats.DTYPES["delta"]
    ]


def _master(held: Tensor | None, param: Tensor) -> Tensor:
    dtype = COMPUTE_DTYPE[param.dtype]
    if held is None:
        return param.detach().to(dtype, copy=True)
    return _beside(held, param, dtype, "master")


def held_average(
    key: str,
    param: Tensor,
    state: Mapping[str, Any],
    teacher: Tensor | None = None,
) -> Tensor:
    """The average ``key`` of a parameter; what has not begun yet is the weights or the teacher.

    Args:
        key: ``"ema"``, ``"ema_1"``, ...
        param: the parameter.
        state: its state, which may be empty.
        teacher: the tensor that is the first average, for that one.

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
    """Let one average begin, for values that are about to be put there.

    The arguments are those of :func:`held_average`, and the parameter's group. Masters and moments
    begin at the first step.
    """
    form = group["ema_format"]
    if teacher is None:
        state[key] = _average(state.get(key), weight_of(param, state), param, form, key)
    else:
        check_teacher(teacher, param, "the teacher's tensor", form)
        state[key] = teacher


def _rest(state: dict[str, Any], weight: Tensor, emas: tuple[str, ...]) -> None:
    """Keep averages that do not move as they are: the weights go on without them."""
    for key in differences(state):
        if key not in emas:
            state[key] = _full(state[key], weight)


def _average(value: Tensor | None, weight: Tensor, param: Tensor, form: str, key: str) -> Tensor:
    """An average as the format keeps it: ``value``, or the weights where there is none."""
    dtype = formats.DTYPES.get(form, COMPUTE_DTYPE[param.dtype])
    if value is None:
        if form == "full":
            return weight.to(dtype, copy=True)
        return _converted(lambda value, _: value, weight, weight, form)
    if value.dtype != dtype and (form != "full" or value.dtype == formats.DTYPES["delta"]):
        # the group's format has changed; a state of another dtype may also be a user's
        value = _beside(value, param, value.dtype, key)
        value = _converted(formats.average, value, weight, form)
    return _beside(value, param, dtype, key)


def _full(value: Tensor, weight: Tensor) -> Tensor:
    """The average that a difference to ``weight`` stands for, in float32."""
    return _converted(formats.average, value, weight, "full")


def _converted(read: formats.Compute, value: Tensor, weight: Tensor, form: str) -> Tensor:
    """The average ``read(value, weight)`` as the format keeps it, in memory of its own."""
    ema = torch.empty_like(weight, dtype=formats.DTYPES.get(form, torch.float32))
    return formats.write(ema, lambda held, w: formats.stored(read(held, w), w, form), value, weight)


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


def _complete_rule_states(
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
            state[key] = _beside(state[key], param, dtype, key)


def reset(rule: Rule, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Zero one parameter's states of the rule and their count, in place: plans hold them."""
    for key in (*rule.states(group), "step"):
        if isinstance(state.get(key), Tensor):
            state[key].zero_()


def counter_device(group: Mapping[str, Any], param: Tensor) -> torch.device:
    """Where base steps are counted: a captured graph can only count on the device."""
    return param.device if group.get("capturable") else torch.device("cpu")


def counter(value: Any, device: torch.device, name: str) -> Tensor:
    """``value`` as a 0-dim float64 tensor on ``device``, itself if it is one already."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise RuntimeError(f"{name} has shape {tuple(value.shape)}; allowed: one element")
    if isinstance(value, Tensor) and value.dtype == torch.float64 and value.device == device:
        return value
    return torch.tensor(float(value), dtype=torch.float64, device=device)


def _beside(value: Tensor, param: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """``value`` where the kernels want it: on the parameter's device, in its memory order."""
    if value.shape != param.shape:
        raise RuntimeError(
            f"state {key!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}"
        )
    in_order = value.stride() == param.stride() or dense_order(param) is None
    in_order = in_order and sharding.placed_alike(value, param)
    if in_order and value.device == param.device and value.dtype == dtype:
        return value
    return sharding.copy(torch.empty_like(param, dtype=dtype).detach(), value)


def check_shape(teacher: Tensor, param: Tensor, name: str) -> None:
    """Raise ValueError unless ``teacher`` has the parameter's shape."""
    for what, tensor in ((name, teacher), (f"the parameter of {name}", param)):
        if is_lazy(tensor):
            raise ValueError(
                f"ema: {what} has no shape yet; allowed: after the first forward of its lazy module"
            )
    if teacher.shape != param.shape:
        raise ValueError(
            f"ema: {name} has shape {tuple(teacher.shape)}, its parameter {tuple(param.shape)}"
        )


def check_teacher(teacher: Tensor, param: Tensor, name: str, form: str = "full") -> None:
    """Raise ValueError unless ``teacher`` can hold the average of ``param``."""
    if form == "delta":
        raise ValueError(
            f"ema: received a teacher with ema_format={form!r}; allowed: ema_format='full', or "
            "'bf16' for a bfloat16 teacher (a difference to the weights is not what a module "
            "computes with)"
        )
    check_shape(teacher, param, name)
    dtype = formats.DTYPES.get(form, COMPUTE_DTYPE.get(param.dtype))
    if is_fixed(param):
        dtype = param.dtype
    if teacher.device != param.device:
        raise ValueError(f"ema: {name} is on {teacher.device}, its parameter on {param.device}")
    if not sharding.placed_alike(teacher, param):
        raise ValueError(
            f"ema: {name} is {sharding.place(teacher)}, its parameter {sharding.place(param)}"
        )
    if teacher.dtype != dtype:
        raise ValueError(
            f"ema: {name} has dtype {teacher.dtype}; allowed for a {param.dtype} parameter with "
            f"ema_format={form!r}: {dtype} (rounded to nearest in fewer bits an average stops "
            "moving; a bfloat16 teacher takes ema_format='bf16')"
        )
