"""The interface of a provider: it makes a step from parameters, and gives access to its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .spec import Groups, Spec


@dataclass(frozen=True)
class Stepper:
    """A provider's step on some parameters, and its results.

    weights: the weights that the rule steps, in float32: the parameters, or their masters.
    emas: the averages, by decay and then by parameter.
    """

    step: Callable[[], object]
    weights: Callable[[], Sequence[Tensor]]
    emas: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Bound:
    """Moves bytes without a result to check.

    arrays: number of reads and writes of a float32 array in a step.
    numel: number of elements of an array; None for that of the case.
    """

    arrays: int
    numel: int | None = None


class NotOfferedError(Exception):
    """The provider does not offer a case, or is not installed; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A way to take a step, made for one optimizer's hyper-parameters."""

    name: str
    make: Callable[[Groups, Spec], Stepper]
    bound: Bound | None = None
