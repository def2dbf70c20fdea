"""Gives an optimizer that a factory has made its model and its teacher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ema.buffers import BUFFERS, EmaBuffersMode, moving, resolve
from ..ema.teacher import Teacher, named
from ..ema.teachers import Teachers
from ..together import together
from .checkpoint import home, teachers_values
from .stepping import Stepping


@torch.no_grad()
def attach(
    optimizer: Stepping,
    model: nn.Module,
    teacher: Teacher | None,
    ema_buffers: EmaBuffersMode | None,
) -> None:
    """See :meth:`~fused_ema.FusedScaledOptimizer.attach_model`."""
    params, groups = optimizer._params(), optimizer.param_groups
    _check(optimizer, model, teacher)
    names = {**optimizer._names, **named(model)}
    buffers = resolve(model, ema_buffers, teacher)
    teachers = optimizer._teachers
    if teacher is not None:
        teachers = Teachers()
        teachers.bind_whole(teacher, [groups[i] for i in optimizer._averaged_groups()], names)
        teachers.check_disjoint(params)
    state = {param: dict(optimizer.state[param]) for param in params if param in optimizer.state}
    targets, sources = teachers_values(groups, state, teachers.tensors)
    calls = [partial(torch._foreach_copy_, targets, sources)] if targets else []
    held, owner = _pop_loaded_buffers(state), home(groups)
    if buffers is not None and held is not None:
        entry, moves = buffers.loaded(held)
        buffers = buffers.holding(entry)
        calls += moving(moves)
        if entry and owner is not None:
            state.setdefault(owner, {})[BUFFERS] = entry
    calls.append(partial(optimizer.state.update, state))
    known = {"_names": names, "_buffers": buffers, "_teachers": teachers}
    calls.append(partial(vars(optimizer).update, known))
    together(calls)
    teachers.reshard()


def _check(optimizer: Stepping, model: nn.Module, teacher: Teacher | None) -> None:
    if optimizer._buffers is not None:
        raise RuntimeError(
            "attach_model(): the optimizer knows its model already; allowed: once, if it was made "
            "without model="
        )
    if teacher is not None and optimizer._teachers.tensors:
        raise RuntimeError("attach_model(): the optimizer has a teacher already; allowed: one")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: received a {type(model).__name__}; allowed: a module")
    if set(optimizer._params()).isdisjoint(model.parameters()):
        raise ValueError("model holds none of the optimizer's parameters")


def _pop_loaded_buffers(state: dict[Tensor, dict[str, Any]]) -> Any:
    """Averaged buffers that were loaded when the model was not known yet."""
    found = [entry.pop(BUFFERS) for entry in state.values() if BUFFERS in entry]
    return found[0] if found else None
