"""What a state dict holds beside torch's, and how it is read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .buckets import COMPUTE_DTYPE
from .ema import decays, ema_keys, is_constant
from .ema_buffers import EmaBuffers
from .formats import DTYPES, average
from .rules import Rule
from .state import check_teacher, loaded, state_dtype, weights
from .values import as_given

# What stands for a schedule in a state dict: a callable does not pass torch's safe unpickler.
SCHEDULE = "schedule"

# Fields that choose an implementation: the loading optimizer's own stay.
IMPLEMENTATION = ("foreach", "fused", "capturable")


def to_save(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of torch's without its unpickler or optimizers would trip over."""
    groups = [
        {
            **{name: _kept(value) for name, value in as_given(group).items()},
            "base_steps": float(group["base_steps"]),
            **({} if is_constant(group["ema_decay"]) else {"ema_decay": SCHEDULE}),
        }
        for group in state_dict["param_groups"]
    ]
    entries = {key: _without_copies(value) for key, value in state_dict["state"].items()}
    # a frozen parameter without averages has no state in torch
    state = {key: value for key, value in entries.items() if set(value) - {"step"}}
    return {**state_dict, "param_groups": groups, "state": state}


def _without_copies(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state without what a step makes of the rest of it."""
    return {key: value for key, value in state.items() if key != "teacher"}


def _kept(value: Any) -> Any:
    """A tensor hyper-parameter as it is at this time: the optimizer's own may be written."""
    if type(value) in (tuple, list):
        return type(value)(map(_kept, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def merged(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved param group with what it lacks, or does not decide, from the present one."""
    saved = as_given(saved)
    kept = {k: v for k, v in group.items() if k not in saved or k in IMPLEMENTATION}
    kept.pop("params", None)
    if saved.get("ema_decay") in (None, SCHEDULE):
        kept["ema_decay"] = group["ema_decay"]
    return {**saved, **kept}


class Loading:
    """A state dict on its way into an optimizer: read before torch takes it in, installed after.

    Args:
        rule: the optimizer's rule.
        check: raises ValueError for a param group that holds a bad value.
        buffers: the optimizer's, if it holds any.
        teachers: the teacher's tensor of every parameter that has one.
    """

    def __init__(
        self,
        rule: Rule,
        check: Callable[[Mapping[str, Any]], Any],
        buffers: EmaBuffers | None,
        teachers: Mapping[Tensor, Tensor],
    ) -> None:
        self._rule = rule
        self._check = check
        self._buffers = buffers
        self._teachers = teachers
        self._state: dict[Any, Any] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []

    def read(
        self, present: Sequence[Mapping[str, Any]], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Check and copy what is given; what is left of it is for torch to load.

        Raises:
            ValueError: groups, states or buffers do not match, a teacher does not fit the saved
                averages' format, or a bad value.
        """
        groups = list(map(merged, present, given["param_groups"]))
        for group, own in zip(groups, present, strict=False):
            self._check(group)
            self._check_teachers(group, own["params"])
        self._state = to_load(self._rule, present, groups, given["state"])
        if self._buffers is not None and "ema_buffers" in given:
            self._copies += self._buffers.matching(given["ema_buffers"])
        # groups that have no counterpart are left for torch to refuse
        groups += given["param_groups"][len(groups) :]
        return {**given, "param_groups": groups, "state": {}}

    def _check_teachers(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        for param in params if decays(group["ema_decay"]) else ():
            if param in self._teachers:
                form = group["ema_format"]
                check_teacher(self._teachers[param], param, "the teacher's tensor", form)

    def install(self, state: dict[Any, Any]) -> None:
        """Put the copies into ``state``; a teacher's tensors take their values and stay."""
        state.update(self._state)
        for param, teacher in self._teachers.items():
            saved = self._state.get(param, {}).get("ema")
            if saved is None:
                continue
            self._copies.append((teacher, average(saved, weights(param, state[param]))))
            if saved.dtype != DTYPES["delta"]:
                state[param]["ema"] = teacher
        for held, saved in self._copies:
            held.detach().copy_(saved)


def to_load(
    rule: Rule,
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    saved_state: Mapping[Any, Any],
) -> dict[Any, Any]:
    """The saved state in copies, under the present parameters.

    Raises:
        ValueError: a state does not fit its parameter.
    """
    rest = dict(saved_state)
    state: dict[Any, Any] = {}
    for group, saved in zip(groups, saved_groups, strict=False):
        states, emas = rule.states(saved), ema_keys(len(decays(saved["ema_decay"])))
        for param, key in zip(group["params"], saved["params"], strict=False):
            if key in rest:
                compute = COMPUTE_DTYPE.get(param.dtype, param.dtype)
                dtypes = dict.fromkeys(emas, DTYPES.get(saved["ema_format"], compute))
                dtypes["master"] = compute
                dtypes |= dict.fromkeys(states, state_dtype(rule, saved, param))
                state[param] = loaded(rest.pop(key), param, dtypes)
    return {**rest, **state}
