"""The slots of a bucket in Python, for where csrc/slots.cpp is not built: the same words.

Device kernels read them, see ``_native.pyi``. Unlike there, memory that a thread resizes while
another one is between :meth:`Slots.begin` and the launch is not kept from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ...extension.standin import has_plain_keys
from ...extension.tensors import C, keys
from .. import layout
from ..gradients import copied
from .plan import Fold

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Averages by their dtype, beside float32 arithmetic.
_ROUNDED = (torch.bfloat16, torch.float16)


class _Row(NamedTuple):
    """Parameters of one group at one step count share a row of scalars."""

    group: int
    active: bool
    before: float = 0.0
    step: float = 0.0


class _Shape(NamedTuple):
    """How a parameter lay when the slots were made."""

    keys: int
    numel: int
    contiguous: bool
    dim: int
    order: tuple[int, ...]


class Slots:
    """A bucket's tensors as the words that a device kernel reads, see ``_native.pyi``."""

    def __init__(
        self,
        num_scalars: int,
        frozen: bool,
        takes_grads: bool,
        capturable: bool,
        master: bool,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        emas: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        param_indices: Sequence[int],
    ) -> None:
        if len(params) > layout.MOST_SLOTS:
            raise ValueError(
                f"params: received {len(params)} tensors; allowed: {layout.MOST_SLOTS}"
            )
        self._num_scalars = num_scalars
        self._frozen, self._takes_grads, self._capturable = frozen, takes_grads, capturable
        self._num_states, self._num_emas = len(states[0]), len(emas[0])
        self._dtype, self._device = params[0].dtype, params[0].device
        self._kinds = [tensor.dtype for tensor in (*states[0], *emas[0])]
        self._rounds = self._check_kinds(master)
        self.slot_layout = layout.slot(master, self._num_states - master, self._num_emas)
        self._params, self._steps = list(params), list(steps)
        self._held = [[*s, *e] for s, e in zip(states, emas, strict=True)]
        self._groups, self._param_indices = list(groups), list(param_indices)
        self._shapes = [
            _Shape(keys(p), p.numel(), p.is_contiguous(), p.dim(), _order(p)) for p in params
        ]
        count = len(params)
        self._rows: list[_Row] = []
        self._row_of = [0] * count
        self._grads: list[Tensor | None] | None = None
        self._table: list[float] = []
        self._grad_words = [0] * count
        self._slot_words: list[list[int]] = [[] for _ in params]
        self._counters = [0] * count
        self._is_held = False
        # since the last pack()
        self._new_table = self._new_rows = self._new_slots = True

    def _check_kinds(self, master: bool) -> bool:
        """Whether a step takes random bits.

        Raises:
            ValueError: dtypes that no kernel takes.
        """
        if self._dtype not in _TYPES:
            raise ValueError(f"no kernel for dtype {self._dtype}")
        arithmetic = torch.float64 if self._dtype == torch.float64 else torch.float32
        weight = self._kinds[0] if master else self._dtype
        rounds = False
        if self._num_states > master:
            state = self._kinds[self._num_states - 1]
            rounds = state != weight
            if rounds and (state, weight) != (torch.bfloat16, torch.float32):
                raise ValueError(f"no kernel for states of {state} beside weights of {weight}")
        average = self._kinds[self._num_states] if self._num_emas else arithmetic
        if average != arithmetic and not (arithmetic == torch.float32 and average in _ROUNDED):
            raise ValueError(f"no kernel for averages of {average} in arithmetic of {arithmetic}")
        return rounds or average != arithmetic

    def prepare(self, fold: Fold) -> bool:
        """Read gradients and pointers, fold the scalars; see ``Plan.prepare``."""
        if self._is_held:
            raise RuntimeError("step() is under way in another thread; allowed: one at a time")
        advances = fold.advances
        self._rows = []
        self._grads = [None] * len(self._params)
        for i, param in enumerate(self._params):
            grad = param.grad if self._takes_grads else None
            if not self._read_pointers(i) or (grad is not None and self._frozen):
                return False
            group, active = self._groups[i], grad is not None
            row = _Row(group, active)
            if active and not self._capturable:
                before = self._steps[i].item()
                row = _Row(group, active, before, before + advances[group])
            if grad is not None:
                self._grads[i] = grad if self._fits(grad, param) else self._copied(grad, param)
            self._read_gradient(i)
            row_index = self._find_row(row)
            self._new_rows |= self._row_of[i] != row_index
            self._row_of[i] = row_index
        if not self._capturable:
            self._fold_rows(fold)
        return True

    def begin(self) -> None:
        """Read all addresses anew, right before kernels use them."""
        if not all(map(self._read_pointers, range(len(self._params)))):
            raise RuntimeError(_MOVED)
        self.begin_gradients()

    def begin_gradients(self) -> None:
        """Read the gradients' addresses anew."""
        if self._grads is None:
            raise RuntimeError("what step() has prepared was dropped by another thread's step()")
        for i, grad in enumerate(self._grads):
            if grad is not None and not self._fits(grad, self._params[i]):
                raise RuntimeError(_MOVED)
            self._read_gradient(i)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep all memory of the step alive; nothing is prepared inside."""
        tensors = [*self._params, *self._steps, *(t for held in self._held for t in held)]
        tensors += [grad for grad in self._grads or () if grad is not None]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            del storages

    @torch.no_grad()
    def advance(self) -> None:
        """Count the prepared step, tell autograd of the writes, let go of the gradients."""
        written = []
        for i, param in enumerate(self._params):
            row = self._rows[self._row_of[i]]
            if row.active:
                if not self._capturable:
                    self._steps[i].data.fill_(row.step)  # as a kernel writes: no version
                written.append(param)
            written += self._held[i][self._num_states :]
        increment_version([tensor for tensor in written if not tensor.is_inference()])
        self.release()

    def release(self) -> None:
        """Let go of the gradients of a step that is not taken."""
        self._grads = None

    @torch.no_grad()
    def uncount(self) -> None:
        """Take the count of the last step back; counters written by others stay."""
        for i, step in enumerate(self._steps):
            row = self._rows[self._row_of[i]]
            counted = row.active and not self._capturable and self._counter(step) is not None
            if counted and step.item() == row.step:
                step.data.fill_(row.before)

    @property
    def num_words(self) -> int:
        return self.word_layout.slots + sum(map(len, self._slot_words))

    @property
    def word_layout(self) -> layout.WordLayout:
        """Where indices of rows, gradients and slots begin."""
        return layout.words(len(self._table), len(self._params))

    @property
    def num_changed(self) -> int:
        """Leading words that differ from those last packed."""
        if self._new_slots:
            return self.num_words
        if self._new_rows:
            return self.word_layout.slots
        return len(self._table) if self._new_table else 0

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def num_slots(self) -> int:
        return len(self._params)

    @property
    def counters(self) -> list[int]:
        """The address of each slot's count, plus one where it has a gradient."""
        active = (self._rows[k].active for k in self._row_of)
        return [where + flag for where, flag in zip(self._counters, active, strict=True)]

    def pack(self, words: Tensor) -> None:
        """Fill an int64 tensor of the CPU with the leading words."""
        if words.dtype != torch.int64 or not words.is_cpu or not words.is_contiguous():
            raise ValueError(
                f"words: received {words.type()}, allowed contiguous int64 words on the CPU"
            )
        slots = [word for slot in self._slot_words for word in slot]
        table = torch.tensor(self._table, dtype=torch.float64, device="cpu").view(torch.int64)
        rest = torch.tensor([*self._grad_words, *slots], dtype=torch.int64, device="cpu")
        leading = torch.cat([table, self._packed_indices(), rest])[: len(words)]
        words[: len(leading)].copy_(leading)
        self._new_table = self._new_rows = self._new_slots = False

    def _packed_indices(self) -> Tensor:
        count = (self.word_layout.grads - self.word_layout.indices) * layout.INDICES_PER_WORD
        indices = torch.zeros(count, dtype=torch.int32, device="cpu")
        indices[: len(self._row_of)] = torch.tensor(self._row_of, dtype=torch.int32, device="cpu")
        return indices.to(torch.int16).view(torch.int64)  # cut off at 16 bits, whatever the sign

    def chunks(self, elements: int) -> Tensor:
        """``(slot, index)`` of each run of ``elements`` elements: int32 ``[n, 2]``."""
        found = [
            (i, k)
            for i, shape in enumerate(self._shapes)
            for k in range(-(-shape.numel // elements))
        ]
        return torch.tensor(found, dtype=torch.int32, device="cpu").view(-1, 2)

    def _read_pointers(self, i: int) -> bool:
        """Whether a slot's tensors lie as they did when the slots were made."""
        param, shape = self._params[i], self._shapes[i]
        if not self._as_planned(param, self._dtype, shape) or param.dim() != shape.dim:
            return False
        counter = self._counter(self._steps[i])
        # the device counts where the counter was when the slots were made
        moved = self._counters[i] not in (0, counter)
        if counter is None or (self._capturable and moved):
            return False
        self._counters[i] = counter
        for tensor, kind in zip(self._held[i], self._kinds, strict=True):
            if not self._as_planned(tensor, kind, shape):
                return False
        words = [shape.numel, self._param_indices[i], *map(_address, (param, *self._held[i]))]
        self._new_slots |= words != self._slot_words[i]
        self._slot_words[i] = words
        return True

    def _read_gradient(self, i: int) -> None:
        grad = self._grads[i] if self._grads is not None else None
        word = 0 if grad is None else _address(grad)
        self._new_rows |= word != self._grad_words[i]
        self._grad_words[i] = word

    def _counter(self, step: Tensor) -> int | None:
        """Where steps are counted, None where they cannot be."""
        if step.dtype != torch.float64 or step.numel() != 1:
            return None
        there = step.device == self._device if self._capturable else step.is_cpu
        return _address(step) if there else None

    def _as_planned(self, tensor: Tensor, dtype: torch.dtype, shape: _Shape) -> bool:
        return (
            keys(tensor) == shape.keys
            and tensor.dtype == dtype
            and tensor.numel() == shape.numel
            and tensor.device == self._device
            and tensor.is_contiguous() == shape.contiguous
            and (shape.contiguous or _order(tensor) == shape.order)
        )

    def _find_row(self, row: _Row) -> int:
        if not self._capturable:
            for k in reversed(range(len(self._rows))):
                if self._rows[k][:3] == row[:3]:
                    return k
        self._rows.append(row)
        return len(self._rows) - 1

    def _fold_rows(self, fold: Fold) -> None:
        table: list[float] = []
        for row in self._rows:
            scalars, ema_rates = fold(row.group, row.step if row.active else None)
            expected = self._num_scalars if row.active else 0
            if len(scalars) != expected or (self._num_emas and len(ema_rates) != self._num_emas):
                raise RuntimeError(
                    f"a rule folds {len(scalars)} scalars, its kernel takes {self._num_scalars}"
                )
            table += [*map(float, scalars), *[0.0] * (self._num_scalars - len(scalars))]
            table += map(float, ema_rates[: self._num_emas])
            if self._rounds:
                table.append(float(fold.seed(row.group)))
        self._new_slots |= len(table) != len(self._table)  # what follows the table has moved
        self._new_table |= table != self._table
        self._table = table

    def _fits(self, grad: Tensor, param: Tensor) -> bool:
        """Whether kernels can read a gradient where it is."""
        return (
            has_plain_keys(grad)
            and C._has_storage(grad)
            and grad.dtype == self._dtype
            and grad.device == self._device
            and grad.shape == param.shape
            and _order(grad) == _order(param)
        )

    def _copied(self, grad: Tensor, param: Tensor) -> Tensor:
        result = copied(grad, param)
        if not self._fits(result, param):
            raise RuntimeError("a gradient's copy is not what it was made as")
        return result


_MOVED = (
    "a parameter, its state or its gradient was replaced or resized while step() was under way; "
    "allowed: between steps"
)


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Strides; those of dimensions of size one do not matter."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(0 if n == 1 else stride for n, stride in pairs)


def _address(tensor: Tensor) -> int:
    """A tensor's first address, 0 where it has no elements; memory of its own, to be written."""
    if tensor.numel() == 0:
        return 0
    size = tensor.untyped_storage().nbytes()
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if size < needed:
        reason = "has a storage that is too small for it"
    elif tensor.data_ptr() == 0:
        reason = "has a storage without memory"
    else:
        return tensor.data_ptr()
    raise RuntimeError(f"a tensor of shape {list(tensor.shape)} {reason}: received {size} bytes")
