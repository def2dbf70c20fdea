"""What happens to a model's buffers (BatchNorm statistics and the like) beside its averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .buckets import COMPUTE_DTYPE
from .claims import claim
from .gradients import Control
from .names import renamed
from .realmath import surely
from .rules import check_choice, ema_update
from .swap import is_shown

MODES = ("copy", "average", "leave")


class Move(NamedTuple):
    """``held <- held + weight*(source - held)`` for one buffer; a weight of 1 copies."""

    held: Tensor
    source: Tensor
    weight: Any


class EmaBuffers:
    """Keeps averaged buffers beside ``num_emas`` averages of a model's parameters.

    ``"copy"``: the averaged model has the model's buffers as they are; ``"average"``: floating
    buffers move like the parameters, others are copied; ``"leave"``: untouched. Buffers are looked
    up in the model by name at every step, so replaced ones are seen; wrappers in names do not
    matter. Where several optimizers keep the buffers of one teacher, one of them moves those, see
    :class:`~fused_ema.claims.Claim`; averages of their own each of them has in full.

    Args:
        model: the student.
        mode: one of the above.
        num_emas: how many averages the parameters have.
        teacher: a module that holds the first average; its buffers are modified in place.

    Raises:
        ValueError: unknown mode, or the teacher's buffers do not match the model's.
    """

    def __init__(
        self, model: nn.Module, mode: str, num_emas: int, teacher: nn.Module | None = None
    ) -> None:
        check_choice("ema_buffers", mode, MODES)
        self.model = model
        self.mode = mode
        self.teacher = teacher
        source = dict(model.named_buffers())
        self.held: list[dict[str, Tensor]] = [
            {name: _held(value) for name, value in source.items()} if mode == "average" else {}
            for _ in range(num_emas)
        ]
        if teacher is not None:
            theirs = renamed(dict(teacher.named_buffers()), source)
            self.held[0] = _paired(theirs, source, mode)

    def moves(self, weights: Sequence[float]) -> list[Move]:
        """What a step does to the held buffers, checked: ``weights`` are ``1 - rho**kappa``.

        Raises:
            ValueError: there are not as many averages as at construction, or a buffer has another
                shape.
            RuntimeError: another optimizer's ``ema_weights()`` has put averaged buffers into the
                model.
        """
        if self.mode == "leave":
            return []
        if len(weights) != len(self.held):
            raise ValueError(
                f"ema_decay gives {len(weights)} averages, but buffers are held for "
                f"{len(self.held)}; make a new optimizer to change their number"
            )
        moves: list[Move] = []
        if not any(self.held):
            return moves
        present = dict(self.model.named_buffers())
        for i, (average, weight) in enumerate(zip(self.held, weights, strict=True)):
            source = renamed(present, average)
            found = [
                Move(held, _matching(name, source, held), self._weight(held, weight))
                for name, held in average.items()
            ]
            if any(is_shown(move.source) for move in found):
                raise RuntimeError(
                    "step() inside another optimizer's ema_weights(): the model's buffers hold the "
                    "average; leave that context first"
                )
            if i > 0 or self.teacher is None or claim(self.teacher).moves(self):
                moves += found
        return moves

    def _weight(self, held: Tensor, weight: float) -> float:
        return weight if self.mode == "average" and held.is_floating_point() else 1.0

    def values(self, index: int) -> dict[Tensor, Tensor]:
        """What the average has in the place of each of the model's buffers, by that buffer."""
        held = self.held[index] if index < len(self.held) else {}
        source = renamed(dict(self.model.named_buffers()), held)
        return {buffer: held.get(name, buffer) for name, buffer in source.items()}

    def pairs(self, index: int) -> dict[Tensor, Tensor]:
        """The held buffer of one average that belongs in the place of each of the model's.

        None for buffers that hold another optimizer's average already.
        """
        values = self.values(index).items()
        return {mine: held for mine, held in values if mine is not held and not is_shown(mine)}

    def by_name(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The model's buffers by name, each with what the average has in its place."""
        held = self.values(index)
        return {name: (buffer, held[buffer]) for name, buffer in self.model.named_buffers()}

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Held buffers, one dict an average."""
        return [dict(held) for held in self.held]

    def matching(self, saved: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """(held, saved) pairs of every buffer.

        Raises:
            ValueError: the saved ones are of another model, mode or number of averages.
        """
        own = [*self.held, *({} for _ in saved[len(self.held) :])]
        saved = [renamed(values, held) for values, held in zip(saved, own, strict=False)]
        names, found = ([sorted(held) for held in both] for both in (self.held, saved))
        if names != found:
            raise ValueError(f"state_dict: ema_buffers holds {found}, allowed: {names}")
        return [
            (tensor, _matching(name, values, tensor))
            for held, values in zip(self.held, saved, strict=True)
            for name, tensor in held.items()
        ]


def resolve(
    model: nn.Module | None, mode: str | None, num_emas: int, teacher: Any
) -> EmaBuffers | None:
    """The buffers to keep for an optimizer's arguments, None where there are none.

    Raises:
        ValueError: buffers were asked for, or exist in the teacher, and the student is unknown.
    """
    teacher = teacher if isinstance(teacher, nn.Module) else None
    if model is not None:
        return EmaBuffers(model, mode or "copy", num_emas, teacher) if num_emas else None
    if mode not in (None, "leave"):
        raise ValueError(f"ema_buffers={mode!r} needs model=<the student module>")
    name = next((name for name, _ in teacher.named_buffers()), None) if teacher else None
    if name is not None and mode is None:
        raise ValueError(
            f"ema: the teacher has buffers (first: {name!r}) and the student's are not known; pass "
            "model=<the student module>, or ema_buffers='leave'"
        )
    return None


@torch.no_grad()
def apply(moves: Sequence[Move], control: Control | None) -> None:
    """Carry out the moves, in place."""
    for held, source, weight in moves:
        taken = None if control is None else control.taken(held.device)
        source = source.to(held.device, held.dtype)
        if not surely(weight == 1.0):
            if taken is not None:
                weight = taken * weight
            if isinstance(weight, Tensor):
                weight = weight.to(held.device, held.dtype)
            ema_update(held, source, weight)
        else:
            held.copy_(source if taken is None else source.where(taken != 0.0, held))


def _paired(
    teacher: dict[str, Tensor], source: Mapping[str, Tensor], mode: str
) -> dict[str, Tensor]:
    for name, value in teacher.items():
        _matching(name, source, value)
        wanted = COMPUTE_DTYPE.get(value.dtype, value.dtype)
        if mode == "average" and value.dtype != wanted:
            raise ValueError(
                f"ema_buffers='average': the teacher's {name!r} has dtype {value.dtype}; allowed: "
                f"{wanted} (rounded to nearest in fewer bits an average stops moving), or "
                "ema_buffers='copy'"
            )
    return teacher


def _matching(name: str, tensors: Mapping[str, Tensor], held: Tensor) -> Tensor:
    if name not in tensors:
        raise ValueError(f"ema_buffers: {name!r} is missing; allowed: every buffer of the average")
    if tensors[name].shape != held.shape:
        raise ValueError(
            f"ema_buffers: {name!r} has shape {tuple(tensors[name].shape)}, allowed: the "
            f"average's {tuple(held.shape)}"
        )
    return tensors[name]


def _held(buffer: Tensor) -> Tensor:
    return buffer.detach().to(COMPUTE_DTYPE.get(buffer.dtype, buffer.dtype), copy=True)
