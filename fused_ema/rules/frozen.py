"""No rule at all: parameters rest or are moved by others, and their averages follow them."""

from __future__ import annotations

from typing import NamedTuple

from ..checks import check_kappa
from .rule import (
    Group,
    Rule,
)


class NoScalars(NamedTuple):
    """Nothing to fold."""


def check(group: Group) -> None:
    check_kappa(group["kappa"])
    if group["ema_format"] == "delta":
        raise ValueError(
            "ema_format='delta': another optimizer moves the weights, so that a difference to them "
            "means another average; allowed: 'full', 'bf16'"
        )


# Parameters that no rule moves; their averages still follow them.
FROZEN = Rule(
    name="frozen",
    numbers=("kappa",),
    flags=(),
    choices={},
    check=check,
    variants={"plain": ()},
    variant=lambda group: "plain",
    scale=lambda group: None,
    at_kappa=lambda group: {},
    fold=lambda hyper, step: NoScalars(),
    update=lambda param, grad, states, scalars: None,
    scalars=NoScalars,
)
