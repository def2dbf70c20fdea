"""What every provider offers: a step made from parameters, and where its results are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .spec import Groups, Spec


@dataclass(frozen=True)
class Stepper:
    """What a provider makes of parameters.

    weights: float32, as the rule leaves them: the parameters, or their masters.
    emas: the averages, by decay and then by parameter.
    """

    step: Callable[[], object]
    weights: Callable[[], Sequence[Tensor]]
    emas: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Bound:
    """What moves bytes without arithmetic: it has no result to check.

    arrays: reads and writes of a float32 array that it makes.
    numel: of its arrays, None for as many elements as the case has.
    """

    arrays: int
    numel: int | None = None


class NotOfferedError(Exception):
    """A provider leaves a case out by design, or is not installed; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A way to step, made for one optimizer's hyper-parameters."""

    name: str
    make: Callable[[Groups, Spec], Stepper]
    bound: Bound | None = None
