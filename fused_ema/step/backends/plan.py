"""The contract between the optimizer and a prepared bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ...extension import native
from ..gradients import Ending

# The rule's scalars (a NamedTuple, empty without a gradient) and the EMA rates.
Scalars: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]


class Fold(Protocol):
    """Scalars of the step at hand, folded in float64 on demand."""

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        """The optimizer's param groups."""

    @property
    def advances(self) -> Sequence[float]:
        """How many base steps of its rule a step of every param group is."""

    def seed(self, group: int) -> int:
        """The seed of the random bits that round a group's averages: 32 bits."""

    def __call__(self, group: int, step: float | None) -> Scalars:
        """A group's scalars after ``step`` base steps; None: no gradient, averages alone."""


class Plan(Protocol):
    """A bucket ready to step, in two halves so that an error leaves nothing half-updated."""

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph uses memory that the plan owns."""

    @property
    def skipping(self) -> native.Slots | None:
        """Where the kernels skip a step by themselves, what it was counted in, to take it back.

        None: ``run`` must be told that nothing is skipped.
        """

    def prepare(self, fold: Fold) -> bool:
        """Read gradients and fold scalars; write nothing.

        What ``run`` takes of the gradients is held until then, whoever else drops it.

        False: a tensor lies elsewhere or otherwise than planned, and the bucket must be made anew.

        Raises:
            RuntimeError: a gradient that cannot be used.
        """

    def release(self) -> None:
        """Let go of the gradients of a step that was prepared, and is not taken."""

    @property
    def num_sums(self) -> int:
        """How many parts a sum of squares is made of."""

    def norm(self, partial_sums: Tensor | None, ending: Ending | None) -> None:
        """A pass over all gradients, as prepared.

        Args:
            partial_sums: of the :func:`~fused_ema.dtypes.widest` dtype of the bucket's device,
                :attr:`num_sums` of them, for sums of squares; None: there is no pass, only its end.
            ending: where this pass is the last of several, how it ends.
        """

    def run(self, control: Tensor | None) -> None:
        """Step every parameter and move every average, in place.

        Args:
            control: of the same dtype: what gradients are multiplied by; not 0 if nothing shall
                move, see :attr:`skipping`; what follows is read by others. None: 1
                and 0.
        """
