"""Pairs the optimizer's parameters with a teacher's, by name where names are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import sharding
from ..dtypes import COMPUTE_DTYPE, is_fixed
from ..names import renamed
from ..sharding import fsdp_modules, is_sharded, local
from . import formats

Teacher: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
Check: TypeAlias = Callable[[Tensor, Tensor, str], None]


def check_shape(teacher: Tensor, param: Tensor, name: str) -> None:
    """Raise ValueError unless ``teacher`` has the parameter's shape."""
    for what, tensor in ((name, teacher), (f"the parameter of {name}", param)):
        if is_lazy(tensor):
            raise ValueError(
                f"teacher: {what} has no shape yet; allowed: after the first forward of its lazy "
                "module"
            )
    if teacher.shape != param.shape:
        raise ValueError(
            f"teacher: {name} has shape {tuple(teacher.shape)}, its parameter {tuple(param.shape)}"
        )


def check_teacher(teacher: Tensor, param: Tensor, name: str, form: str = "full") -> None:
    """Raise ValueError unless ``teacher`` can hold the average of ``param``."""
    if form == "delta":
        raise ValueError(
            f"teacher: received a teacher with ema_format={form!r}; allowed: ema_format='full', or "
            "'bf16' for a bfloat16 teacher (a module cannot compute with a difference to the "
            "weights)"
        )
    check_shape(teacher, param, name)
    dtype = formats.DTYPES.get(form, COMPUTE_DTYPE.get(param.dtype))
    if is_fixed(param):
        dtype = param.dtype
    if teacher.device != param.device:
        raise ValueError(f"teacher: {name} is on {teacher.device}, its parameter on {param.device}")
    if not sharding.placed_alike(teacher, param):
        raise ValueError(
            f"teacher: {name} is {sharding.describe_placement(teacher)}, its parameter "
            f"{sharding.describe_placement(param)}"
        )
    if teacher.dtype != dtype:
        raise ValueError(
            f"teacher: {name} has dtype {teacher.dtype}; allowed for a {param.dtype} parameter "
            f"with ema_format={form!r}: {dtype} (an average rounded to nearest in fewer bits stops "
            "moving; a bfloat16 teacher takes ema_format='bf16')"
        )


def pair(
    teacher: Teacher,
    params: Sequence[Tensor],
    names: Mapping[Tensor, str],
    in_order: bool,
    check: Check = check_teacher,
) -> dict[Tensor, Tensor]:
    """The teacher's tensor of every parameter.

    A module or named tensors pair by name when the student's names are known (``model=`` or
    ``named_parameters()``), whatever wrappers there are; everything else pairs in order.

    Args:
        teacher: a module, its parameters, or its named parameters.
        params: the student's parameters that have an average, in param-group order.
        names: names of the student's parameters, as far as known.
        in_order: whether ``params`` may be in the order of a module's parameters: one param group.
        check: raises ValueError for a pair that does not fit.

    Raises:
        ValueError: count, name, shape, dtype or device do not match; the message names the first.
    """
    named, tensors = _entries(teacher)
    if named and all(param in names for param in params):
        return _by_name(renamed(dict(named), names.values()), params, names, check)
    if not in_order:
        raise ValueError(
            "teacher: several param groups cannot be paired by order; pass model=<the student "
            "module> and the teacher as a module, so that names are known, or give each group its "
            "own 'teacher'"
        )
    return _by_order(tensors, params, {tensor: name for name, tensor in named}, check)


def named(module: nn.Module) -> dict[Tensor, str]:
    """The names of a module's parameters."""
    return {param: name for name, param in module.named_parameters()}


def lasting(teacher: Teacher) -> Teacher:
    """The teacher in a form that can be read twice: an iterator's tensors become a list."""
    if isinstance(teacher, nn.Module | Tensor) or not isinstance(teacher, Iterable):
        return teacher
    items: list[Any] = list(teacher)
    return items


def by_name(teacher: Teacher) -> nn.Module | dict[str, Tensor]:
    """The module or dict in which a teacher's tensors are found by name; empty without names."""
    return teacher if isinstance(teacher, nn.Module) else dict(_entries(teacher)[0])


def _entries(teacher: Teacher) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    if isinstance(teacher, Tensor) or not isinstance(teacher, nn.Module | Iterable):
        raise ValueError(
            f"teacher: received a {type(teacher).__name__}; allowed: a module or an iterable of "
            "tensors"
        )
    items: list[Any] = list(
        teacher.named_parameters() if isinstance(teacher, nn.Module) else teacher
    )
    named = [item for item in items if isinstance(item, tuple)]
    tensors = [item[1] if isinstance(item, tuple) else item for item in items]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"teacher: received a {type(tensor).__name__}; allowed: tensors")
    return named if len(named) == len(items) else [], tensors


def _by_name(
    teacher: Mapping[str, Tensor],
    params: Sequence[Tensor],
    names: Mapping[Tensor, str],
    check: Check,
) -> dict[Tensor, Tensor]:
    known = set(names.values())
    for name in teacher:
        if name not in known:
            raise ValueError(f"teacher: its parameter {name!r} is not in the student")
    pairs = {}
    for param in params:
        name = names[param]
        if name not in teacher:
            raise ValueError(
                f"teacher: it has no parameter {name!r}; give its param group ema_decay=None if it "
                "has no average"
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
            f"teacher: it has {len(teacher)} tensors, the optimizer averages {len(params)}; "
            "they must pair one to one (a group without an average takes ema_decay=None)"
        )
    return dict(zip(params, teacher, strict=True))


def resharding_modules(teacher: Teacher) -> list[Any]:
    """The modules of a teacher for which FSDP2 may keep full copies of its tensors."""
    return fsdp_modules(teacher) if isinstance(teacher, nn.Module) else []


def check_whole(teacher: Teacher, tensors: Iterable[Tensor]) -> None:
    """Raise ValueError for DTensors without a module, whose full copies could not be dropped."""
    if not isinstance(teacher, nn.Module) and any(map(is_sharded, tensors)):
        raise ValueError(
            "teacher: received DTensors without their module, which may hold full copies of them; "
            "allowed: teacher=<the module>"
        )


def check_buffers_given(teacher: Teacher) -> None:
    """Warn if a param group's teacher has buffers, which would be ignored."""
    if not isinstance(teacher, nn.Module):
        return
    saved = set(teacher.state_dict())
    name = next((name for name, _ in teacher.named_buffers() if name in saved), None)
    if name is not None:
        warnings.warn(
            f"a param group's 'teacher' is a module with buffers (first: {name!r}), which are left "
            "as they are: only the optimizer's teacher=<module> with model=<the student module> "
            "moves them; pass list(module.named_parameters()) as 'teacher' to leave them without "
            "this warning",
            stacklevel=4,
        )


def fitting(groups: Sequence[Mapping[str, Any]]) -> Check:
    """The check that a teacher's tensors suit the format of the groups' averages."""
    forms = {group["ema_format"] for group in groups}
    if len(forms) > 1:
        raise ValueError(
            f"teacher: a teacher with ema_format={sorted(forms)}; allowed: the same in all groups"
        )
    return partial(check_teacher, form=forms.pop())


def check_disjoint(teachers: Iterable[Tensor], params: Iterable[Tensor]) -> None:
    """Raise ValueError if a teacher tensor shares memory with another one or with a parameter."""
    spans = sorted(
        (*_span(tensor), is_teacher)
        for tensors, is_teacher in ((teachers, True), (params, False))
        for tensor in map(local, tensors)
        if tensor.numel() > 0
    )
    end = {True: 0, False: 0}  # of teachers' memory so far, of parameters'
    for start, stop, is_teacher in spans:
        if start < end[True] or (is_teacher and start < end[False]):
            raise ValueError(
                "teacher: one of its tensors shares memory with another or with a parameter; each "
                "average needs its own memory"
            )
        end[is_teacher] = max(end[is_teacher], stop)


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
