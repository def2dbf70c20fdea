"""Copies and averages of a model's buffers (BatchNorm statistics and the like)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import setitem
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_choice
from ..dtypes import COMPUTE_DTYPE
from ..names import bare
from ..realmath import surely
from ..rules.blending import lerp
from ..sharding import check_copyable, repeats
from ..together import Call
from .claims import claim
from .swap import is_shown

EmaBuffersMode: TypeAlias = Literal["copy", "average", "leave"]
# Whether the current step is taken: 1 or 0 on the device, or None if it certainly is.
Taken: TypeAlias = Callable[[torch.device], Tensor | None]
# Key of the averaged buffers in a parameter's state: a dict by average, "0", "1", ..., and name.
BUFFERS = "ema_buffers"


class Move(NamedTuple):
    """``held <- held + rate*(source - held)`` for one buffer; a rate of 1 copies."""

    held: Tensor
    source: Tensor
    rate: Any

    def calls(self, taken_on: Taken | None) -> list[Call]:
        """Compute the new value; return the calls that write it."""
        held, source, rate = self
        taken = None if taken_on is None else taken_on(held.device)
        source = source.to(held.device, held.dtype)
        if not surely(rate == 1.0):
            if taken is not None:
                rate = taken * rate
            if isinstance(rate, Tensor):
                rate = rate.to(held.device, held.real.dtype)
            if held.is_complex():
                held, source = map(torch.view_as_real, (held, source.resolve_conj()))
            source = lerp(held, source, rate)
        elif taken is not None:
            if held.itemsize == 1:  # one-byte dtypes, such as float8, are selected as bytes
                held, source = held.view(torch.uint8), source.view(torch.uint8)
            source = source.where(taken != 0.0, held)
        return [partial(held.detach().copy_, source)]


class Placement(NamedTuple):
    """``into[key] = value``: for a buffer that is new, has another shape or is not writable."""

    into: dict[str, Any]
    key: str
    value: Tensor

    def calls(self, taken_on: Taken | None) -> list[Call]:
        """The calls that assign it, unless the step is skipped; the host waits for that answer."""
        taken = None if taken_on is None else taken_on(torch.device("cpu"))
        is_taken = taken is None or taken != 0.0
        return [partial(setitem, self.into, self.key, self.value)] if is_taken else []


Moves: TypeAlias = "list[Move | Placement]"


class _BufferEntry(NamedTuple):
    """A module's entry for a buffer, ``owner._buffers[key]``; a cache is not ``persistent``."""

    owner: nn.Module
    key: str
    persistent: bool

    @property
    def value(self) -> Tensor | None:
        """The buffer; None if there is none, as in a lazy module before its first forward."""
        found: Tensor | None = self.owner._buffers[self.key]
        return None if found is None or is_lazy(found) else found


class EmaBuffers:
    """The averaged buffers that belong to the averages of a model's parameters.

    ``"copy"``: the averaged model takes the model's buffers as they are; ``"average"``:
    floating-point buffers are averaged like the parameters, others are copied; ``"leave"``: they
    are untouched. Every step looks up buffers in the model by name and follows those in its
    ``state_dict()``: a new or resized buffer starts at its present value. Caches
    (``persistent=False``) stay the model's own, and are copied to a teacher if they fit. Wrappers
    in names do not matter. If several optimizers share one teacher, one of them moves its buffers,
    see :class:`~fused_ema.ema.claims.Claim`; each keeps all of the averages that are its own.

    Args:
        model: the student.
        mode: one of the above.
        teacher: a module that holds the first average; its buffers are modified in place.

    Attributes:
        averages: the optimizer's averaged buffers by name, one dict an average; empty before they
            exist.

    Raises:
        ValueError: unknown mode, or the teacher's buffers do not match the model's.
    """

    def __init__(
        self, model: nn.Module, mode: EmaBuffersMode, teacher: nn.Module | None = None
    ) -> None:
        self.model = model
        self.mode = mode
        self.averages: list[dict[str, Tensor]] = []
        self._teacher = teacher
        if teacher is not None:
            _check_teacher(_buffer_entries(teacher), _buffer_entries(model), mode)

    def begin(self, num_emas: int) -> None:
        """Start the averaged buffers that do not exist yet at the model's values.

        Raises:
            RuntimeError: another optimizer's ``ema_weights()`` has put averaged buffers into the
                model.
        """
        while len(self.averages) < num_emas:
            self.averages.append({})
        if self.mode != "average":
            return
        self._check_not_shown()
        for held in self.averages[self._first_own :]:
            for move in self._following(held, 1.0):
                if isinstance(move, Placement) and move.key not in held:
                    held[move.key] = move.value

    def moves(self, ema_rates: Sequence[float]) -> Moves:
        """The checked moves of a step; ``ema_rates`` are the EMA rates, ``1 - rho**kappa``.

        Raises:
            RuntimeError: as for :meth:`begin`.
        """
        if self.mode == "leave" or (self.mode == "copy" and self._teacher is None):
            return []
        self._check_not_shown()
        moves: Moves = []
        if self._teacher is not None and ema_rates and claim(self._teacher).moves(self):
            moves += self._teaching(_buffer_entries(self._teacher), ema_rates[0])
        own = slice(self._first_own, None)  # averages that are turned off do not move
        for held, rate in zip(self.averages[own], ema_rates[own], strict=False):
            moves += self._following(held, rate)
        return moves

    def _check_not_shown(self) -> None:
        if any(map(is_shown, self.model.buffers())):
            raise RuntimeError(
                "step() inside another optimizer's ema_weights(): the model's buffers hold the "
                "average; leave that context first"
            )

    @property
    def _first_own(self) -> int:
        """The first average that is the optimizer's own."""
        return 0 if self._teacher is None else 1

    def _following(self, held: dict[str, Tensor], rate: float) -> Moves:
        moves: Moves = []
        if self.mode != "average":
            return moves
        for name, source in _persistent(_buffer_entries(self.model)):
            mine = held.get(name)
            if not _is_writable(source):
                continue  # the model's own buffer is used
            if mine is None or not _fits(mine, source):
                moves.append(Placement(held, name, _begun(source)))
            else:
                moves.append(Move(mine, source, rate if _averages(source) else 1.0))
        return moves

    def _teaching(self, teacher: Mapping[str, _BufferEntry], rate: float) -> Moves:
        moves: Moves = []
        for name, buffer_entry in _buffer_entries(self.model).items():
            source, target = buffer_entry.value, teacher.get(name)
            if source is None or target is None or source.is_meta:
                continue
            mine = target.value
            if (
                mine is not None
                and _is_writable(mine)
                and _is_writable(source)
                and _fits(mine, source)
            ):
                averages = self.mode == "average" and buffer_entry.persistent and _averages(source)
                moves.append(Move(mine, source, rate if averages else 1.0))
            elif buffer_entry.persistent:
                moves.append(Placement(target.owner._buffers, target.key, _copied(source, mine)))
        return moves

    def _by_name(self, index: int) -> dict[str, Tensor]:
        """The average's buffers that belong in a state dict, by name."""
        if index == 0 and self._teacher is not None:
            return dict(_persistent(_buffer_entries(self._teacher)))
        return self.averages[index] if index < len(self.averages) else {}

    def values(self, index: int) -> dict[Tensor, Tensor]:
        """The average's value for each of the model's buffers, by that buffer."""
        held = self._by_name(index)
        found = {}
        for name, buffer_entry in _buffer_entries(self.model).items():
            buffer = buffer_entry.value
            if buffer is not None:
                mine = held.get(name, buffer)
                found[buffer] = (
                    mine if _is_writable(buffer) and mine.shape == buffer.shape else buffer
                )
        return found

    def pairs(self, index: int) -> dict[Tensor, Tensor]:
        """The averaged buffer that replaces each of the model's buffers, by that buffer.

        Buffers that already hold another optimizer's average are left out.
        """
        values = self.values(index).items()
        return {mine: held for mine, held in values if mine is not held and not is_shown(mine)}

    def by_name(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The model's buffers by name, each with the average's value for it."""
        held = self.values(index)
        buffers = self.model.named_buffers()
        return {name: (buffer, held[buffer]) for name, buffer in buffers if buffer in held}

    def entry(self) -> dict[str, dict[str, Tensor]]:
        """The averaged buffers themselves, by average and name, as a state dict holds them.

        A teacher's buffers that are not plain tensors are only in the teacher's own state dict.
        """
        count = max(len(self.averages), self._first_own)
        held = [self._by_name(index).items() for index in range(count)]
        found = {
            str(i): {n: t for n, t in items if _is_writable(t)} for i, items in enumerate(held)
        }
        return found if any(found.values()) else {}

    def loaded(self, saved: Any) -> tuple[dict[str, dict[str, Tensor]], Moves]:
        """Copies of saved buffers, and the moves that restore a teacher's; changes nothing.

        Args:
            saved: an :meth:`entry`; names may be nested dicts, as torch.distributed.checkpoint
                makes them.

        Returns:
            The argument for :meth:`holding`, and the teacher's moves.

        Raises:
            ValueError: the model has no buffer of a name, or a value is not a tensor with values.
        """
        buffer_entries = _buffer_entries(self.model)
        moves: Moves = []
        held: dict[str, dict[str, Tensor]] = {}
        for path, value in _leaves(saved):
            index, _, name = path.partition(".")
            value = check_copyable(f"state_dict: ema_buffers {path!r}", value)
            if not index.isdecimal() or name not in buffer_entries:
                raise ValueError(
                    f"state_dict: ema_buffers holds {path!r}; allowed: the number of an average, "
                    f"and one of the model's {sorted(buffer_entries)}"
                )
            mine = buffer_entries[name].value
            if value.is_complex() and mine is not None and not mine.is_complex():
                raise ValueError(
                    f"state_dict: ema_buffers {path!r} has dtype {value.dtype}; allowed: what "
                    f"casts to {mine.dtype}"
                )
            if index == "0" and self._teacher is not None:
                moves += self._taught(name, value)
            elif self.mode == "average" and buffer_entries[name].persistent:
                device = value.device if mine is None or mine.is_meta else mine.device
                held.setdefault(index, {})[name] = _begun(value.to(device))
        return held, moves

    def _taught(self, name: str, value: Tensor) -> Moves:
        target = _buffer_entries(self._teacher).get(name) if self._teacher is not None else None
        if target is None:
            return []
        mine = target.value
        value = _copied(value, mine)
        if mine is not None and mine.shape == value.shape and _is_writable(mine):
            return [Move(mine, value, 1.0)]
        return [Placement(target.owner._buffers, target.key, value)]

    def holding(self, entry: Mapping[str, dict[str, Tensor]]) -> EmaBuffers:
        """A copy that holds other buffers: those of an :meth:`entry`, or none."""
        other = copy.copy(self)
        count = max((int(index) + 1 for index in entry), default=0)
        other.averages = [dict(entry.get(str(index), {})) for index in range(count)]
        if other.averages and self._teacher is not None:
            other.averages[0] = {}
        return other


def resolve(
    model: nn.Module | None, mode: EmaBuffersMode | None, teacher: Any
) -> EmaBuffers | None:
    """The averaged buffers that an optimizer's arguments ask for; None if they ask for none.

    Raises:
        ValueError: buffers were asked for, or exist in the teacher, and the student is unknown.
    """
    if mode is not None:
        check_choice("ema_buffers", mode, EmaBuffersMode)
    teacher = teacher if isinstance(teacher, nn.Module) else None
    if model is not None:
        return EmaBuffers(model, mode or "copy", teacher)
    if mode not in (None, "leave"):
        raise ValueError(f"ema_buffers={mode!r} needs model=<the student module>")
    name = next((name for name, _ in teacher.named_buffers()), None) if teacher else None
    if name is not None and mode is None:
        raise ValueError(
            f"teacher: it has buffers (first: {name!r}) and the student's are not known; pass "
            "model=<the student module>, or ema_buffers='leave'"
        )
    return None


@torch.no_grad()
def moving(moves: Moves, taken_on: Taken | None = None) -> list[Call]:
    """The calls that carry out the moves, in place."""
    return [call for move in moves for call in move.calls(taken_on)]


def _buffer_entries(module: nn.Module) -> dict[str, _BufferEntry]:
    """A module's buffer entries by name; a shared buffer appears under its first name."""
    found: dict[str, _BufferEntry] = {}
    seen = set()
    for prefix, owner in module.named_modules():
        caches = getattr(owner, "_non_persistent_buffers_set", ())
        for key, value in owner._buffers.items():
            if value is None or value not in seen:
                seen.add(value)
                name = f"{prefix}.{key}" if prefix else key
                found[name] = _BufferEntry(owner, key, key not in caches)
    short = bare([*found, *(name for name, _ in module.named_parameters())])
    return {short[name]: buffer_entry for name, buffer_entry in found.items()}


def _persistent(buffer_entries: Mapping[str, _BufferEntry]) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict holds, with their names."""
    for name, buffer_entry in buffer_entries.items():
        if buffer_entry.persistent and buffer_entry.value is not None:
            yield name, buffer_entry.value


def _is_writable(buffer: Tensor) -> bool:
    """Whether the buffer can be written element by element."""
    strange = buffer.layout != torch.strided or buffer.is_quantized or buffer.is_meta
    return not (strange or repeats(buffer))


def _averages(buffer: Tensor) -> bool:
    return buffer.dtype in COMPUTE_DTYPE


def _fits(held: Tensor, source: Tensor) -> bool:
    """Whether ``held`` can still follow ``source``, by shape and dtype."""
    alike = held.dtype == source.dtype or (_averages(held) and _averages(source))
    return alike and held.shape == source.shape


def _begun(buffer: Tensor) -> Tensor:
    return buffer.detach().to(COMPUTE_DTYPE.get(buffer.dtype, buffer.dtype), copy=True)


def _copied(source: Tensor, target: Tensor | None) -> Tensor:
    """A copy for a teacher: on the device of ``target``, in its dtype if both are floating."""
    if target is None:
        return source.detach().clone()
    value = source.detach().clone().to(target.device)
    return value.to(target.dtype) if _averages(source) and _averages(target) else value


def _leaves(saved: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dicts, under their keys joined by dots."""
    if not isinstance(saved, Mapping):
        yield prefix, saved
        return
    for key, value in saved.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _check_teacher(
    teacher: Mapping[str, _BufferEntry], source: Mapping[str, _BufferEntry], mode: str
) -> None:
    for name, value in _persistent(teacher):
        if name not in source:
            raise ValueError(
                f"ema_buffers: {name!r} is missing; allowed: every buffer of the average"
            )
        own = source[name].value
        if own is not None and own.shape != value.shape:
            raise ValueError(
                f"ema_buffers: {name!r} has shape {tuple(own.shape)}, allowed: the average's "
                f"{tuple(value.shape)}"
            )
        wanted = COMPUTE_DTYPE.get(value.dtype, value.dtype)
        if mode == "average" and value.dtype != wanted:
            raise ValueError(
                f"ema_buffers='average': the teacher's {name!r} has dtype {value.dtype}; allowed: "
                f"{wanted} (an average rounded to nearest in fewer bits stops moving), or "
                "ema_buffers='copy'"
            )
