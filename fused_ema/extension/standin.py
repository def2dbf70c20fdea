"""A Python substitute for what the package needs from its extension.

The interface is that of ``_native.pyi``, as far as the foreach, reference and Triton backends need
it; the two kinds of plan are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from .swap import Swap as Swap
from .tensors import C, bits, extent, is_subclass, keys


def cpu_targets() -> list[str]:
    """Return no targets: there are no native CPU loops."""
    return []


def rule_variants() -> dict[str, dict[str, int]]:
    """No rules that are compiled."""
    return {}


class Watch:
    """Remembers which objects an optimizer's param groups and state hold."""

    def __init__(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
        # keeps the objects alive, so that no identity is reused
        self._listed, self._held = list(_walk_groups(param_groups)), list(_walk_state(state))

    def unchanged(self, param_groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether groups and state hold the same objects in the same order."""
        return _same(self._listed, _walk_groups(param_groups)) and _same(
            self._held, _walk_state(state)
        )


def _walk_groups(param_groups: list[dict[str, Any]]) -> Iterator[Any]:
    for group in param_groups:
        params = group["params"]
        yield params
        yield from params


def _walk_state(state: Mapping[Any, Any]) -> Iterator[Any]:
    for param, entry in state.items():
        yield param
        yield entry
        if isinstance(entry, dict):
            yield from chain.from_iterable(entry.items())


def _same(objects: list[Any], found: Iterator[Any]) -> bool:
    there = list(found)
    return len(objects) == len(there) and all(map(is_, objects, there))


_DENSE = bits(DispatchKey.Dense)
_TRACKED = bits(
    DispatchKey.ADInplaceOrView,
    DispatchKey.AutogradFunctionality,
    DispatchKey.AutogradOther,
    DispatchKey.AutogradNestedTensor,
)
_AUTOCAST = bits(*(k for name, k in DispatchKey.__members__.items() if name[:8] == "Autocast"))
# the devices' bits lie below the bit of dense memory
_PLAIN = (_DENSE - 1) | _DENSE | _TRACKED | _AUTOCAST


def has_plain_keys(tensor: Tensor) -> bool:
    """Whether the dispatcher sees a tensor as dense memory and nothing else."""
    return not keys(tensor) & ~_PLAIN


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is plain memory: no subclass, nothing lazy, no inference tensor."""
    tracked = bool(keys(tensor) & _TRACKED)  # an inference tensor has none of these keys
    return has_plain_keys(tensor) and tracked and C._has_storage(tensor)


def _first(tensor: Tensor) -> int:
    """A tensor's first address; reading it does not trigger a copy of copy-on-write memory."""
    if not C._has_storage(tensor):
        return 0
    storage: int = C._data_address(tensor)
    return storage + int(tensor.storage_offset()) * tensor.element_size() if storage else 0


class Gradients:
    """Remembers which gradients parameters have, and keeps them alive."""

    def __init__(self, params: list[Tensor]) -> None:
        self._seen = [(param.grad, *_state(param.grad)) for param in params]

    def unchanged(self, params: list[Tensor]) -> bool:
        """Whether the parameters have the same gradients, unwritten as far as autograd knows."""
        if len(params) != len(self._seen):
            return False
        now = [param.grad for param in params]
        return all(
            grad is seen and (grad is None or not grad.is_inference()) and _state(grad) == state
            for grad, (seen, *state) in zip(now, self._seen, strict=True)
        )


def _state(grad: Tensor | None) -> list[int]:
    if grad is None:
        return []
    return [_first(grad), 0 if grad.is_inference() else grad._version]


class Addresses:
    """Remembers the addresses of tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._first = list(map(_first, tensors))

    def unchanged(self, tensors: list[Tensor]) -> bool:
        """Whether each tensor begins at the same address."""
        return self._first == list(map(_first, tensors))


def spans(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Start and end addresses of each tensor's memory; 0 and 0 as in ``_native.pyi``."""
    return list(map(_span, tensors))


def _is_copied_when_written(tensor: Tensor) -> bool:
    if is_subclass(tensor):  # torch gives addresses of plain tensors only
        with C._DisableTorchDispatch():
            plain = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            tensor = plain.set_(tensor.untyped_storage())
    found: bool = C._is_cow_tensor(tensor)
    return found


def _span(tensor: Tensor) -> tuple[int, int]:
    if not C._has_storage(tensor) or tensor.layout != torch.strided or tensor.numel() == 0:
        return 0, 0
    begin = _first(tensor)
    if begin == 0 or _is_copied_when_written(tensor):
        return 0, 0
    return begin, begin + extent(tensor) * tensor.element_size()
