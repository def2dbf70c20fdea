"""Follows parameters that a wrapper (FSDP2, XLA) has replaced in the param groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..ema.teacher import check_teacher

Groups = Sequence[Mapping[str, Any]]


def follow(
    before: Sequence[Sequence[Tensor]],
    groups: Groups,
    names: dict[Tensor, str],
    state: dict[Any, Any],
    teachers: dict[Tensor, Tensor],
) -> None:
    """Move state and teachers from replaced parameters to the new ones of the same names.

    Args:
        before: the parameters of the groups when they were last seen.
        groups: the param groups.
        names: names of old and new parameters, as far as known; those of the old are removed.
        state: the optimizer's state; modified in place, as are ``teachers``.
        teachers: the teacher's tensor of every parameter that has one.

    Raises:
        RuntimeError: a teacher, averages or masters would be lost. Nothing moves then.
        ValueError: a teacher's tensor does not fit the new parameter.
    """
    pairs = []
    known = {param for params in before for param in params}
    present = {param for group in groups for param in group["params"]}
    for index, (old, group) in enumerate(zip(before, groups, strict=False)):
        new = [param for param in group["params"] if param not in known]
        held = [p for p in old if p not in present and _is_held(p, state, teachers)]
        if new and held:
            pairs += _paired(index, held, new, names)
    for old_param, param in pairs:
        if old_param in teachers:
            form = next(_forms(groups, param))
            check_teacher(teachers[old_param], param, repr(names[param]), form)
    for old_param, param in pairs:
        for holder in (teachers, state):
            if old_param in holder:
                holder[param] = holder.pop(old_param)
        names.pop(old_param, None)


def _is_held(param: Tensor, state: Mapping[Any, Any], teachers: Mapping[Tensor, Tensor]) -> bool:
    return param in teachers or not {"ema", "master"}.isdisjoint(state.get(param, ()))


def _paired(
    index: int, old: Sequence[Tensor], new: Sequence[Tensor], names: Mapping[Tensor, str]
) -> list[tuple[Tensor, Tensor]]:
    by_name = {names[param]: param for param in new if param in names}
    pairs = []
    for param in old:
        other = by_name.get(names.get(param, ""))
        if other is None:
            raise RuntimeError(
                f"params: parameters of group {index} have been replaced, and the new one for "
                f"{names.get(param, 'an unnamed one')!r} of shape {tuple(param.shape)} is not "
                "known; its average, master or teacher would be lost. Make the optimizer with "
                "model= or named_parameters(), or after the parameters are replaced"
            )
        if other.shape != param.shape:
            raise RuntimeError(
                f"params: {names[param]!r} has been replaced by one of shape "
                f"{tuple(other.shape)}; allowed: {tuple(param.shape)}"
            )
        pairs.append((param, other))
    return pairs


def _forms(groups: Groups, param: Tensor) -> Any:
    return (g["ema_format"] for g in groups if any(p is param for p in g["params"]))
