"""Writes and reads what a state dict holds in addition to torch's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import sharding
from ..checks import check_choice
from ..dtypes import COMPUTE_DTYPE, is_fixed, is_there, weight_of
from ..ema import formats
from ..ema.averages import differences
from ..ema.buffers import BUFFERS, EmaBuffers, moving
from ..ema.decay import decays, ema_keys, is_constant
from ..names import bare
from ..rules.rule import Rule
from ..step import clock
from ..step.buckets import wants_master
from ..step.state import drop_master, state_dtype
from ..together import together
from ..values import as_given

# Replaces a schedule in a state dict, because torch's safe unpickler refuses a callable.
SCHEDULE = "schedule"

# Fields that choose an implementation or a storage format: loading keeps the present ones.
CHOICES = (
    *("foreach", "fused", "capturable", "differentiable"),
    *("master_weights", "ema_format", "state_format"),
)

# Fields that load, with a warning if the constructor was given another value.
ASKED = ("kappa", "kappa_scales", "ema_decay", "ema_order")

Groups = Sequence[Mapping[str, Any]]


def to_save(
    state_dict: Mapping[str, Any],
    groups: Groups,
    buffers: EmaBuffers | None,
    entry: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Torch's state dict without the entries that its unpickler or other optimizers refuse.

    Args:
        state_dict: the state dict as torch has packed it.
        groups: the param groups that it was packed from.
        buffers: the optimizer's averaged buffers, if it holds any.
        entry: gives the part of one parameter's state that is saved.
    """
    saved_groups = state_dict["param_groups"]
    state = dict(state_dict["state"])
    owner, held = home(groups), {} if buffers is None else buffers.entry()
    for group, saved in zip(groups, saved_groups, strict=True):
        for param, key in zip(group["params"], saved["params"], strict=True):
            if isinstance(state.get(key), Mapping):
                kept = entry(_entry_to_save(state[key], group, param))
                if param is owner and held:
                    kept[BUFFERS] = held
                # torch holds no state for a frozen parameter without averages
                if set(kept) == {"step"} or (state[key] and not kept):
                    del state[key]
                else:
                    state[key] = kept
    return {**state_dict, "param_groups": [_group_to_save(g) for g in saved_groups], "state": state}


def _group_to_save(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: _kept(value) for name, value in as_given(group).items()},
        "base_steps": float(group["base_steps"]),
        **({} if is_constant(group["ema_decay"]) else {"ema_decay": SCHEDULE}),
    }


def _entry_to_save(
    state: Mapping[str, Any], group: Mapping[str, Any], param: Tensor
) -> dict[str, Any]:
    """One parameter's state, with averages in the format that its group names."""
    kept = dict(state)
    if group["ema_format"] != "delta":  # a loaded difference that no step has converted yet
        for key in differences(kept):
            kept[key] = formats.average(kept[key], weight_of(param, kept))
    return kept


def _kept(value: Any) -> Any:
    """A copy of a tensor hyper-parameter, because the optimizer's own may be written later."""
    if type(value) in (tuple, list):
        return type(value)(map(_kept, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def merged(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved param group; fields that it lacks or does not decide come from the present one."""
    taken = {k: copy.deepcopy(v) for k, v in saved.items() if k not in ("params", "param_names")}
    taken = as_given(taken)
    if isinstance(taken.get("ema_decay"), str) or not decays(taken.get("ema_decay")):
        taken.pop("ema_decay", None)
    if "param_names" in saved and "param_names" not in group:
        taken["param_names"] = list(saved["param_names"])
    return {**group, **taken, **{k: group[k] for k in CHOICES if k in group}}


class Loaded(NamedTuple):
    """A loaded state dict in the form in which the optimizer will hold it.

    Attributes:
        groups: param groups.
        state: the optimizer's state.
        write: writes a teacher's values in place; a second call changes nothing.
    """

    groups: list[dict[str, Any]]
    state: dict[Any, Any]
    write: Callable[[], None]


def load(
    rule: Rule,
    present: Groups,
    asked: Groups,
    given: Mapping[str, Any],
    check: Callable[[Sequence[Mapping[str, Any]]], Any],
    buffers: EmaBuffers | None,
    teachers: Mapping[Tensor, Tensor],
) -> Loaded:
    """Check and copy a whole state dict, without changing the optimizer.

    Args:
        rule: the optimizer's rule.
        present: the optimizer's param groups.
        asked: for each group, the :data:`ASKED` fields that its constructor was given.
        given: the state dict.
        check: raises ValueError for param groups that hold a bad value.
        buffers: the optimizer's averaged buffers, if it holds any.
        teachers: the teacher's tensor of every parameter that has one.

    Raises:
        ValueError: groups, names, states or buffers do not match, or a value is bad.
    """
    saved_groups = _matching(present, given["param_groups"])
    groups = [merged(*pair) for pair in zip(present, saved_groups, strict=True)]
    for group in groups:
        clock.check(group)
    check(groups)
    rest = dict(given["state"])
    state: dict[Any, Any] = {}
    saved_buffers = None
    for group, saved in zip(groups, saved_groups, strict=True):
        form = saved.get("ema_format", "full")  # says how the averages are to be read
        check_choice("state_dict: ema_format", form, formats.EmaFormat)
        for param, key in zip(group["params"], saved["params"], strict=True):
            if key not in rest:
                continue
            entry = dict(_mapping(rest.pop(key)))
            saved_buffers = entry.pop(BUFFERS, None) or saved_buffers
            state[param] = _entry(rule, group, param, entry, form)
    _warn_about_asked(groups, asked)
    _warn_about_teacher(groups, saved_groups, state, teachers)
    writes = _Writes(*teachers_values(groups, state, teachers))
    owner = home(groups)
    if saved_buffers is not None and buffers is None and owner is not None:
        # until attach_model() says which module they belong to
        held = _own("state_dict: 'ema_buffers'", saved_buffers, owner)
        state.setdefault(owner, {})[BUFFERS] = held
    elif saved_buffers is not None:
        held, writes.moves = ({}, []) if buffers is None else buffers.loaded(saved_buffers)
        if not held and not writes.moves:
            warn_about_buffers(stacklevel=5)
        if held and owner is not None:
            state.setdefault(owner, {})[BUFFERS] = held
    return Loaded(groups, {**rest, **state}, writes)


def home(groups: Groups) -> Tensor | None:
    """The parameter whose state holds averaged buffers: the first with an average.

    torch.distributed.checkpoint saves the states of trained parameters, and no others.
    """
    averaged = [
        param
        for group in groups
        if decays(group["ema_decay"])
        for param in group["params"]
        if is_there(param) and not is_fixed(param)
    ]
    return next((p for p in averaged if p.requires_grad), averaged[0] if averaged else None)


class _Writes:
    """A teacher's tensors, and the values that they take."""

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        self.targets = targets
        self.sources = sources
        self.moves: list[Any] = []

    @torch.no_grad()
    def __call__(self) -> None:
        if self.targets:
            # one call, which Python's signal handlers cannot interrupt
            torch._foreach_copy_(self.targets, self.sources)
        together(moving(self.moves))


def teachers_values(
    groups: Groups, state: Mapping[Any, Any], teachers: Mapping[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's local tensors and their new values; puts the teacher into the states."""
    targets, sources = [], []
    for group in groups:
        for param in group["params"]:
            entry = state.get(param, {})
            if param not in teachers or "ema" not in entry:
                continue
            teacher = teachers[param]
            value = formats.average(entry["ema"], weight_of(param, entry)).to(teacher.dtype)
            targets.append(sharding.local(teacher).detach())
            sources.append(sharding.local(value))
            entry["ema"] = teacher
    return targets, sources


def _matching(present: Groups, saved: Groups) -> list[Mapping[str, Any]]:
    """The saved groups in the order of the present parameters, matched by name.

    Raises:
        ValueError: the numbers of groups or parameters differ, or the names do.
    """
    if len(present) != len(saved):
        raise ValueError(
            "state_dict: loaded state dict has a different number of parameter groups: "
            f"{len(saved)}; allowed: {len(present)}"
        )
    return list(map(_in_order, range(len(saved)), present, saved))


def _in_order(index: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(group["params"]) != len(saved["params"]):
        raise ValueError(
            "state_dict: loaded state dict contains a parameter group that doesn't match the size "
            f"of optimizer's group {index}: {len(saved['params'])} parameters; allowed: "
            f"{len(group['params'])}"
        )
    own, theirs = (list(bare(g.get("param_names") or ()).values()) for g in (group, saved))
    if not own or not theirs or own == theirs:
        return saved
    for mine, other in ((own, theirs), (theirs, own)):
        odd = next((name for name in mine if name not in other), None)
        if odd is not None:
            where = "missing" if mine is own else "not the optimizer's"
            raise ValueError(
                f"state_dict: param_names of group {index}: {odd!r} is {where}; allowed: the names "
                "that the optimizer was given, in any order"
            )
    ids = dict(zip(theirs, saved["params"], strict=True))
    return {**saved, "params": [ids[name] for name in own]}


def _mapping(entry: Any) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"state_dict: a state is a {type(entry).__name__}; allowed: a dict")
    return entry


def _entry(
    rule: Rule, group: Mapping[str, Any], param: Tensor, saved: Mapping[str, Any], form: str
) -> dict[str, Any]:
    """A copy of one parameter's saved state, in the form that the optimizer keeps.

    Args:
        rule: the optimizer's rule.
        group: the parameter's group, as it will be after loading.
        param: the parameter.
        saved: the state as ``state_dict`` holds it; None and empty values count as missing.
        form: the ``ema_format`` that it was saved with.

    Raises:
        ValueError: a state does not fit the parameter.
    """
    compute = COMPUTE_DTYPE.get(param.dtype, param.dtype)
    emas = ema_keys(len(decays(group["ema_decay"])))
    average = formats.DTYPES["bf16"] if group["ema_format"] == "bf16" else compute
    dtypes = {
        "step": torch.float64,
        "master": compute,
        **dict.fromkeys(emas, average),
        **dict.fromkeys(rule.states(group), state_dtype(group, param)),
    }
    entry: dict[str, Any] = {}
    for key, value in saved.items():
        if key in dtypes and (value is None or _is_empty(value)):
            continue
        if key == "step":
            count = clock.number("state_dict: 'step'", value)
            entry[key] = torch.tensor(count, dtype=torch.float64, device="cpu")
        elif key in dtypes:
            value = sharding.check_copyable(f"state_dict: {key!r}", value)
            difference = key in emas and form == "delta" and value.dtype == formats.DTYPES["delta"]
            dtype = value.dtype if difference else dtypes[key]
            entry[key] = _laid_out(key, value, param, dtype)
        else:
            entry[key] = _own(f"state_dict: {key!r}", value, param)
    if not wants_master(group, param):
        drop_master(entry)
    return entry


def _is_empty(value: Any) -> bool:
    """Whether the value is the empty dict of torch.distributed.checkpoint for a missing one."""
    return isinstance(value, Mapping) and not value


def _laid_out(key: str, value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    lazy = is_lazy(param)  # the first step checks the shape
    if not lazy and value.shape != param.shape:
        raise ValueError(
            f"state_dict: {key!r} has shape {tuple(value.shape)}, its parameter "
            f"{tuple(param.shape)}"
        )
    if not torch.can_cast(value.dtype, dtype):
        raise ValueError(
            f"state_dict: {key!r} has dtype {value.dtype}; allowed: what casts to {dtype}"
        )
    if lazy:
        return value.detach().to(param.device, dtype, copy=True)
    return sharding.copy(torch.empty_like(param, dtype=dtype).detach(), value.detach())


def _own(name: str, value: Any, param: Tensor) -> Any:
    """A copy of the user's own value; its tensors go to the parameter's device."""
    if isinstance(value, Tensor):
        if value.is_meta and not param.is_meta:
            raise ValueError(f"{name} is a meta tensor; allowed: a tensor with values")
        return value.detach().to(param.device, copy=True)
    if isinstance(value, dict):
        return {key: _own(name, entry, param) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own(name, entry, param) for entry in value)
    return copy.deepcopy(value)


def warn_about_buffers(stacklevel: int) -> None:
    """Warn that averaged buffers of a loaded state dict are dropped."""
    warnings.warn(
        "state_dict: it holds averaged buffers, and they are not kept; to keep them, pass model= "
        "and ema_buffers='average' to the optimizer, or to attach_model() before the next step",
        stacklevel=stacklevel + 1,
    )


def _warn_about_asked(groups: Groups, asked: Groups) -> None:
    """Warn about fields whose loaded values differ from the constructor's arguments."""
    for field in ASKED:
        for group, wanted in zip(groups, asked, strict=False):
            if field in wanted and _plain(wanted[field]) != _plain(group[field]):
                warnings.warn(
                    f"{field}={wanted[field]!r} was given to the optimizer, and the state dict's "
                    f"{group[field]!r} is loaded in its place; to use another value, set it in "
                    "param_groups after loading",
                    stacklevel=6,
                )
                break


def _plain(value: Any) -> Any:
    """A field's value in a form to compare: numbers, in a tuple if there may be several."""
    if isinstance(value, str):
        return value
    return tuple(d if callable(d) else float(d) for d in decays(value))


def _warn_about_teacher(
    groups: Groups,
    saved_groups: Groups,
    state: Mapping[Any, Any],
    teachers: Mapping[Tensor, Tensor],
) -> None:
    """Warn if a trained optimizer's state dict lacks the average of a teacher."""
    for group, saved in zip(groups, saved_groups, strict=True):
        foreign = "base_steps" not in saved
        for param in group["params"]:
            lacks = "ema" not in state[param] if param in state else foreign
            if param in teachers and lacks:
                warnings.warn(
                    "state_dict: there is no average for the teacher, which stays as it is; copy "
                    "the weights into it by teacher.load_state_dict(model.state_dict()), or "
                    "its average by fused_ema.load_ema(optimizer, model, ...)",
                    stacklevel=6,
                )
                return
