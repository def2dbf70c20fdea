"""The context of ``ema_weights()`` in Python, used if csrc/swap.cpp is not built."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .tensors import C, extent, is_subclass, keys

# Tensors inside a swap have versions from here on, see csrc/swap.cpp.
_INSIDE = 1 << 31
_WRITES = 1 << 12
_count = count()
_entry = threading.RLock()


def _set_version(tensor: Tensor, version: int) -> None:
    C._autograd._unsafe_set_version_counter((tensor,), (version,))


def _directly(function: Callable[[], Any]) -> Any:
    """Call with torch's own operators only: no autograd, and no dispatch mode, which is Python.

    The guards are C objects, so that no exception can come between a change and its undoing.
    """
    with (
        C._InferenceMode(False),
        C._AutoDispatchBelowAutograd(),
        C.DisableTorchFunction(),
        C._DisableTorchDispatch(),
    ):
        return function()


def _dispatched(function: Callable[[], Any]) -> Any:
    """Call with the operators of tensor subclasses, which may be Python, but no autograd."""
    with C._InferenceMode(False), C._AutoDispatchBelowAutograd():
        return function()


def _operating(*tensors: Tensor) -> Callable[[Callable[[], Any]], Any]:
    return _dispatched if any(map(is_subclass, tensors)) else _directly


def _has_memory(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    return bool(plain and C._has_storage(tensor) and not is_subclass(tensor))


def _lies_in(tensor: Tensor, memory: Tensor) -> bool:
    return bool(
        C._has_storage(tensor)
        and C._is_alias_of(tensor, memory)
        and tensor.dtype == memory.dtype
        and tensor.storage_offset() == memory.storage_offset()
        and tensor.shape == memory.shape
        and tensor.stride() == memory.stride()
        and keys(tensor) == keys(memory)
    )


def _is_whole(memory: Tensor) -> bool:
    needed = (memory.storage_offset() + extent(memory)) * memory.element_size()
    return extent(memory) == 0 or memory.untyped_storage().nbytes() >= needed


def _elements(memory: Tensor) -> Tensor:
    """A view that holds every element once, even of an expanded tensor."""
    if not any(s == 0 and n > 1 for n, s in zip(memory.shape, memory.stride(), strict=True)):
        return memory
    return memory.as_strided((extent(memory),), (1,), memory.storage_offset())


class _Held:
    """One tensor of an open swap, see csrc/swap.h; each method may be called repeatedly.

    Python cannot keep autograd's accumulator, and the hooks on it, of a parameter that is cast
    meanwhile.
    """

    def __init__(
        self, owner: Tensor, part: Tensor, value: Tensor | None, copied: bool, name: str
    ) -> None:
        self.owner, self.part, self.value = owner, part, value
        self.copied, self.name = copied, name
        self.kept: Tensor | None = None
        self.grad: Tensor | None = None
        self.grad_memory: Tensor | None = None
        self.memory: Tensor | None = None
        self.counters: list[tuple[Tensor, int]] = []
        _directly(self._remember)

    def _remember(self) -> None:
        owner, part, value, name = self.owner, self.part, self.value, self.name
        self.memory = part.data if _has_memory(part) else None  # it has a version of its own
        # tensors that share the version counter, wherever these tensors are swapped to
        self.counters = [
            (tensor if is_subclass(tensor) else tensor.detach(), tensor._version)
            for tensor in (owner, part)
            if not tensor.is_inference()
        ]
        if value is not None and any(version >= _INSIDE for _, version in self.counters):
            raise RuntimeError(
                f"ema_weights(): {name} holds another optimizer's average; leave that context first"
            )
        if not is_subclass(part) and part.is_leaf and part.grad is not None:
            self.grad = part.grad
            self.grad_memory = self.grad.data if _has_memory(self.grad) else None

    def keep(self) -> None:
        """Copy the values; this happens for all tensors before the first is written."""
        if not self.copied or self.part.is_meta:
            return
        _operating(self.part)(self._copy)

    def _copy(self) -> None:
        values = self.part.detach() if self.memory is None else _elements(self.memory)
        self.kept = values.clone()

    def put(self, version: int) -> None:
        """Write the new value, and set the version."""
        if self.value is None:
            return
        for counter, _ in self.counters:
            _set_version(counter, version)
        _operating(self.part, self.value)(self._write)

    def _write(self) -> None:
        target = self.part.detach() if self.memory is None else self.memory
        if self.value is not None:
            target.copy_(self.value)

    def reattach(self) -> None:
        """Give the tensor its memory back, and undo a cast of its gradient."""
        _directly(self._reattach)
        owner: Any = self.owner
        if owner is not self.part and owner._local_tensor is not self.part:
            raise RuntimeError("its local tensor was replaced")

    def _reattach(self) -> None:
        now, memory, kept = self.part, self.memory, self.kept
        if memory is not None:
            whole = _is_whole(memory)
            if not whole and kept is not None and kept.shape == memory.shape:
                now.data = kept
            elif not whole:
                raise RuntimeError("its storage was resized")
            elif not _lies_in(now, memory):
                now.data = memory
        elif kept is not None and not is_subclass(now):
            now.data = kept
        if not is_subclass(now):
            self._reattach_gradient(now)

    def _reattach_gradient(self, now: Tensor) -> None:
        grad, memory = self.grad, self.grad_memory
        if grad is None or memory is None or not now.is_leaf:
            return
        current = now.grad
        cast = current is not None and (
            (current.dtype, current.device, current.layout)
            != (memory.dtype, memory.device, memory.layout)
        )
        # a gradient of the right kind that the user has set stays
        if not cast and current is not grad:
            return
        if not _lies_in(grad, memory):
            grad.data = memory
        if current is not grad:
            now.grad = grad

    def restore(self) -> None:
        """Restore the values of the memory, and the tensor's version."""
        written = (
            not self.copied
            and bool(self.counters)
            and self.counters[0][0]._version != self.counters[0][1]
        )
        _operating(self.part)(self._write_back)
        if written:
            raise RuntimeError("it was written in entry, and no copy of it is kept")
        for counter, version in self.counters:
            _set_version(counter, version)
        if self.counters and not self.part.is_inference():
            _set_version(self.part, self.counters[-1][1])

    def _write_back(self) -> None:
        if self.kept is None:
            return
        if self.memory is None:
            if is_subclass(self.part):
                self.part.detach().copy_(self.kept)
        elif _is_whole(self.memory):
            _elements(self.memory).copy_(self.kept)


def _restore_entry(entries: Any, key: str, value: Any, fixed: bool) -> None:
    found = entries.get(key, entries)
    if found is value:
        return
    tensors = isinstance(found, Tensor) and isinstance(value, Tensor)
    if fixed or not tensors or found.shape == value.shape:
        entries[key] = value


class Swap:
    """A context manager that puts values into tensors and restores everything, see csrc/swap.h.

    It lists what to undo before the first value moves, and every item of the list may be repeated.
    So an exception in the middle, such as a signal handler's, is raised after everything is
    restored. An exception between the entry and the body of the ``with`` leaves the context open
    until it is dropped, which restores too; only the extension rules that out.
    """

    def __init__(self, flag: Any, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        self._flag, self._begin, self._end = flag, begin, end
        self._stage = "fresh"
        self._undo: list[tuple[str, Callable[[], None]]] = []  # the next to undo is the last

    def __enter__(self) -> None:
        if self._stage != "fresh":
            raise RuntimeError(
                "ema_weights(): this context has been entered before; make a new one"
            )
        with _entry:
            while self._flag.swapped:
                self._flag.check("ema_weights()")
            self._stage = "entered"
            self._flag.swapped = True
        try:
            self._put(self._begin())
        except BaseException:
            self._finish("fresh")
            raise
        self._stage = "open"

    def __exit__(self, *exception: object) -> None:
        if self._stage != "open":
            raise RuntimeError("ema_weights(): the context is not open")
        self._close()

    def __del__(self) -> None:
        if getattr(self, "_stage", "fresh") in ("entered", "open"):
            self._close()

    def _put(self, begun: Any) -> None:
        held = [_Held(*kept) for kept in begun.tensors]
        undo: list[tuple[str, Callable[[], None]]] = [
            (entry[1], lambda entry=entry: _restore_entry(*entry))  # type: ignore[misc]
            for entry in begun.entries
        ]
        undo += [(tensor.name, tensor.reattach) for tensor in held]
        undo += [(tensor.name, tensor.restore) for tensor in held]
        for tensor in held:
            tensor.keep()
        version = _INSIDE + next(_count) * _WRITES % _INSIDE
        self._undo = undo[::-1]
        for tensor in held:
            tensor.put(version)

    def _close(self) -> None:
        lost, errors = self._finish("closed", self._end)
        if lost:
            raise RuntimeError(f"ema_weights(): could not restore {'; '.join(lost)}")
        if errors:
            raise errors[0]

    def _finish(
        self, stage: str, end: Callable[[], Any] | None = None
    ) -> tuple[list[str], list[BaseException]]:
        """Undo everything, whatever is raised; returns what could not be undone, and the errors."""
        lost: list[str] = []
        errors: list[BaseException] = []
        while self._stage != stage:
            try:
                while self._undo:
                    self._undo_one(lost, errors)
                if end is not None:
                    # its references must be dropped even if a signal handler raises in it
                    _twice(end, errors)
                self._flag.swapped = False
                self._stage = stage
            except BaseException as error:  # raised again by who calls
                errors.append(error)
        return lost, errors

    def _undo_one(self, lost: list[str], errors: list[BaseException]) -> None:
        name, undo = self._undo[-1]
        raised: list[BaseException] = []
        if _twice(undo, raised):
            errors += raised
        else:
            lost.append(f"{name}: {raised[-1]}")
        self._undo.pop()


def _twice(function: Callable[[], Any], errors: list[BaseException]) -> bool:
    """Whether a call succeeds; if it is interrupted, whether a second call does."""
    for _ in range(2):
        try:
            function()
            return True
        except BaseException as error:  # raised again by who calls
            errors.append(error)
    return False
