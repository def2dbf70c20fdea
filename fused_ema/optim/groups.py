"""Checks of the fields that a param group holds besides those of its rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..checks import check_choice, check_range
from ..ema.decay import EmaOrder, check_ema_decay, scaled_decay
from ..ema.formats import EmaFormat, StateFormat
from ..rules.rule import Rule, rule_kappa
from ..scaling import KappaScales
from ..step import clock
from ..step.backends import requested_backend
from ..step.folding import Checked, Group, fields_without_tensors
from ..values import as_given

# The default of ``kappa``, which its identity tells apart from a 1.0 that the user gives.
KAPPA = float("1")

# Flags of every rule. A rule's own flags are bools too, except the names of its scaling rules.
SWITCHES = ("master_weights", "capturable", "differentiable")


def check_group(rule: Rule, group: Group, backend: str) -> Checked:
    """The group's numbers, checked and scaled.

    Args:
        rule: the optimizer's rule.
        group: a param group, or the fields of a future one.
        backend: the optimizer's, ``"auto"`` or a name.

    Raises:
        ValueError: a value is bad, the scaling rules cannot follow it, or values exclude each
            other.
    """
    group = as_given(group)
    for flag in (*SWITCHES, *(flag for flag in rule.flags if flag not in rule.choices)):
        _check_switch(flag, group[flag])
    # record a graph only if gradients should reach the scaled values
    with torch.set_grad_enabled(bool(group["differentiable"])):
        values = fields_without_tensors(rule, group)
    rule.check({**group, **values})
    check_ema_decay(values["ema_decay"])
    check_choice("ema_order", group["ema_order"], EmaOrder)
    check_choice("kappa_scales", group["kappa_scales"], KappaScales)
    check_choice("ema_format", group["ema_format"], EmaFormat)
    check_choice("state_format", group["state_format"], StateFormat)
    _check_seed(group["rounding_seed"])
    requested_backend(group, backend)
    ema_every, max_grad_norm = group["ema_every"], group["max_grad_norm"]
    if not isinstance(ema_every, int) or ema_every < 1:
        raise ValueError(f"ema_every={ema_every!r} is out of range; allowed: an int >= 1")
    if max_grad_norm is not None:
        check_range("max_grad_norm", max_grad_norm, 0.0, math.inf)
    if ema_every > 1 and group["ema_format"] == "delta":
        raise ValueError(
            f"ema_every={ema_every} with ema_format='delta'; allowed: 1, because a difference "
            "moves whenever its weights do"
        )
    if ema_every > 1 and group["capturable"]:
        raise ValueError(f"ema_every={ema_every} with capturable=True; allowed: 1")
    if max_grad_norm is not None and group["differentiable"]:
        raise ValueError(f"max_grad_norm={max_grad_norm} with differentiable=True; allowed: None")
    with torch.set_grad_enabled(bool(group["differentiable"])):
        return Checked(values, rule.scaled({**values, "kappa_scales": group["kappa_scales"]}))


def scaled_hyperparameters(rule: Rule, group: Group) -> dict[str, Any]:
    """What the next step of a group uses, as floats; see the method of the optimizers."""
    known = {name: _known(group[name]) for name in (*rule.numbers, "ema_decay", "base_steps")}
    group = {**group, **known}
    kappa = float(group["kappa"])
    numbers = rule.at_kappa({**group, "kappa": rule_kappa(group, kappa)})
    to_go = max(1, int(group["ema_every"]) - int(group.get("ema_skips", 0)))
    ema_decay = scaled_decay(known["ema_decay"], *clock.ema_span(group, kappa, to_go))
    return {**numbers, "ema_decay": ema_decay}


def _known(value: Any) -> Any:
    """A value whose tensors are read, which waits for their device."""
    if isinstance(value, tuple | list):
        return tuple(map(_known, value))
    return value.item() if isinstance(value, torch.Tensor) else value


def _check_switch(name: str, value: Any) -> None:
    # 0 and 1 are allowed, as in torch
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name}={value!r} is not known; allowed: True or False")


def check_groups(groups: Sequence[Group]) -> None:
    """Raise ValueError if groups differ in a field that must be the same in all of them."""
    agreed(groups, "ema_every")
    agreed(groups, "max_grad_norm")


def agreed(groups: Sequence[Group], field: str) -> Any:
    """The value of a field that all param groups have in common.

    Raises:
        ValueError: they differ.
    """
    value = groups[0][field] if groups else None
    for group in groups:
        if group[field] is not value and group[field] != value:
            values = [group[field] for group in groups]
            raise ValueError(f"{field} differs between param groups: {values}")
    return value


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"rounding_seed={seed!r} is out of range; allowed: an int in [0, 2**32)")
