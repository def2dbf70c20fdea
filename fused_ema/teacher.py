"""Pairs the optimizer's parameters with a teacher's, by name where names are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from .state import check_teacher

Teacher: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
Check: TypeAlias = Callable[[Tensor, Tensor, str], None]


def pair(
    teacher: Teacher,
    params: Sequence[Tensor],
    names: Mapping[Tensor, str],
    in_order: bool,
    check: Check = check_teacher,
) -> dict[Tensor, Tensor]:
    """The teacher's tensor of every parameter.

    A module or named tensors pair by name when the student's names are known (``model=`` or
    ``named_parameters()``); everything else pairs in order.

    Args:
        teacher: a module, its parameters, or its named parameters.
        params: the student's parameters that have an average, in param-group order.
        names: names of the student's parameters, as far as known.
        in_order: whether ``params`` may be in a module's own order: one param group.
        check: raises ValueError for a pair that does not fit.

    Raises:
        ValueError: count, name, shape, dtype or device do not match; the message names the first.
    """
    named, tensors = _entries(teacher)
    if named and all(param in names for param in params):
        return _by_name(dict(named), params, names, check)
    if isinstance(teacher, nn.Module) and not in_order:
        raise ValueError(
            "ema: a teacher module cannot be paired by order with several param groups; pass "
            "model=<the student module> or named_parameters(), so that names are known"
        )
    return _by_order(tensors, params, {tensor: name for name, tensor in named}, check)


def _entries(teacher: Teacher) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    if isinstance(teacher, Tensor):
        raise ValueError("ema: received one tensor; allowed: a module or an iterable of tensors")
    items: list[Any] = list(
        teacher.named_parameters() if isinstance(teacher, nn.Module) else teacher
    )
    named = [item for item in items if isinstance(item, tuple)]
    tensors = [item[1] if isinstance(item, tuple) else item for item in items]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"ema: received a {type(tensor).__name__}; allowed: tensors")
    return named if len(named) == len(items) else [], tensors


def _by_name(
    teacher: Mapping[str, Tensor],
    params: Sequence[Tensor],
    names: Mapping[Tensor, str],
    check: Check,
) -> dict[Tensor, Tensor]:
    pairs = {}
    for param in params:
        name = names[param]
        if name not in teacher:
            raise ValueError(
                f"ema: the teacher has no parameter {name!r}; give its param group ema_decay=None "
                "if it has no average"
            )
        check(teacher[name], param, repr(name))
        pairs[param] = teacher[name]
    return pairs


def _by_order(
    teacher: Sequence[Tensor],
    params: Sequence[Tensor],
    names: Mapping[Tensor, str],
    check: Check,
) -> dict[Tensor, Tensor]:
    for i, (tensor, param) in enumerate(zip(teacher, params, strict=False)):
        name = f"tensor {i} ({names[tensor]!r})" if tensor in names else f"tensor {i}"
        check(tensor, param, name)
    if len(teacher) != len(params):
        raise ValueError(
            f"ema: the teacher has {len(teacher)} tensors, the optimizer averages {len(params)}; "
            "they must pair one to one (a group without an average takes ema_decay=None)"
        )
    return dict(zip(params, teacher, strict=True))
