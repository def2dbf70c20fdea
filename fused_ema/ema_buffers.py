"""What happens to a model's buffers (BatchNorm statistics and the like) beside its averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import COMPUTE_DTYPE
from .rules import check_choice, ema_update
from .tensorlist import TensorList

MODES = ("copy", "average", "leave")


class EmaBuffers:
    """Keeps averaged buffers beside ``num_emas`` averages of a model's parameters.

    ``"copy"``: the averaged model takes the model's buffers as they are; ``"average"``: floating
    buffers move like the parameters, others are copied; ``"leave"``: untouched. Buffers are looked
    up in the model by name at every step, so replaced ones are seen.

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
        source = dict(model.named_buffers())
        self.held: list[dict[str, Tensor]] = [
            {name: _held(value) for name, value in source.items()} if mode == "average" else {}
            for _ in range(num_emas)
        ]
        if teacher is not None:
            self.held[0] = _paired(dict(teacher.named_buffers()), source)

    @torch.no_grad()
    def step(self, weights: Sequence[float]) -> None:
        """Move the held buffers, in place: ``weights`` are ``1 - rho**kappa`` of each average."""
        if self.mode == "leave":
            return
        source = dict(self.model.named_buffers())
        for held, weight in zip(self.held, weights, strict=True):
            moving = [n for n in held if self.mode == "average" and held[n].is_floating_point()]
            copied = [name for name in held if name not in moving]
            if moving:
                values = [source[name].to(held[name].dtype) for name in moving]
                ema_update(TensorList([held[n] for n in moving]), TensorList(values), weight)
            for name in copied:
                held[name].copy_(source[name])

    def values(self, index: int) -> Mapping[str, Tensor]:
        """Held buffers of one average by name; a name that is missing is the model's own."""
        return self.held[index]

    def pairs(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """(model's buffer, held buffer) of one average, for swapping."""
        source = dict(self.model.named_buffers())
        return [(source[name], held) for name, held in self.held[index].items()]

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Held buffers, one dict an average."""
        return [dict(held) for held in self.held]

    def matching(self, saved: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """(held, saved) pairs of every buffer.

        Raises:
            ValueError: the saved ones are of another model, mode or number of averages.
        """
        names, found = ([sorted(held) for held in both] for both in (self.held, saved))
        if names != found:
            raise ValueError(f"state_dict: ema_buffers holds {found}, allowed: {names}")
        return [
            (tensor, values[name])
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


def _paired(teacher: dict[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in teacher.items():
        if name not in source:
            raise ValueError(f"ema: the teacher's buffer {name!r} is not in the model")
        if value.shape != source[name].shape:
            raise ValueError(
                f"ema: buffer {name!r} has shape {tuple(value.shape)}, the model's "
                f"{tuple(source[name].shape)}"
            )
    return teacher


def _held(buffer: Tensor) -> Tensor:
    return buffer.detach().to(COMPUTE_DTYPE.get(buffer.dtype, buffer.dtype), copy=True)
