"""The context in which weights hold an average, and what it keeps to restore them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ContextDecorator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..extension import native
from ..sharding import describe_placement, local, placed_alike

# Tensors that hold an average have versions from here on, see csrc/swap.cpp.
FIRST_VERSION_INSIDE = 1 << 31


def is_shown(tensor: Tensor) -> bool:
    """Whether a tensor holds an average, inside the ``ema_weights()`` of any optimizer."""
    if is_lazy(tensor) or tensor.is_inference():
        return False
    return tensor._version >= FIRST_VERSION_INSIDE


class Flag:
    """Whether an optimizer's weights hold an average.

    Wrappers of the optimizer share this one object with it; it is never replaced.
    """

    __slots__ = ("swapped",)

    def __init__(self) -> None:
        self.swapped = False

    def check(self, what: str) -> None:
        """Raise RuntimeError for ``what`` while the weights hold an average."""
        if self.swapped:
            raise RuntimeError(
                f"{what} inside ema_weights(): the parameters hold the average; leave the context "
                "first"
            )


class Kept(NamedTuple):
    """A tensor that the exit restores."""

    owner: Tensor
    part: Tensor
    """The local tensor of a DTensor owner; any other owner itself."""
    value: Tensor | None
    """What the part holds while the context is open; None: what it held before."""
    copied: bool
    """Whether its values are kept, not its memory alone."""
    name: str


class ModuleEntry(NamedTuple):
    """An entry of a module's dict of parameters or buffers."""

    entries: MutableMapping[str, Any]
    name: str
    value: Tensor | None
    fixed: bool
    """False: the module may leave a tensor of another shape there, as caches do."""


class Begun(NamedTuple):
    """Everything that the exit restores."""

    tensors: list[Kept]
    entries: list[ModuleEntry]


class Swap(native.Swap, ContextDecorator):
    """The context that :meth:`~fused_ema.ema.access.EmaAccess.ema_weights` returns; enter it once.

    ``__enter__`` and ``__exit__`` are C functions, so that no signal handler, and hence no
    exception, can interrupt the swap. Without the extension they are Python: after an exception
    between the entry and the body, the weights are restored when the context is dropped. As a
    decorator it is entered at each call.
    """

    def __init__(self, flag: Flag, begin: Callable[[], Begun], end: Callable[[], None]) -> None:
        super().__init__(flag, begin, end)
        self._arguments = (flag, begin, end)

    def _recreate_cm(self) -> Swap:  # ContextDecorator calls it for each call
        return type(self)(*self._arguments)


def begun(
    values: Mapping[Tensor, Tensor],
    params: Iterable[Tensor],
    names: Mapping[Tensor, str],
    modules: Iterable[nn.Module],
) -> Begun:
    """Collect what the context must keep while tensors hold other values.

    It copies all tensors that take another value, parameters that require a gradient, and buffers.
    For frozen parameters it keeps the memory alone, because there may be many.

    Args:
        values: the value that each tensor takes, of the same shape.
        params: the optimizer's parameters.
        names: their names, as far as known.
        modules: the known modules, whose parameters and buffers are kept too.

    Raises:
        RuntimeError: a value has another shape than its tensor, or lies in other processes.
    """
    tensors: dict[Tensor, Kept] = {}

    def keep(tensor: Tensor, copied: bool, name: str) -> None:
        if tensor in tensors or is_lazy(tensor):
            return
        value = values.get(tensor)
        if value is tensor:
            value = None
        if value is not None:
            _check_fits(value, tensor, name)
            value = local(value)
        tensors[tensor] = Kept(tensor, local(tensor), value, copied or value is not None, name)

    for module in modules:
        for name, param in module.named_parameters():
            keep(param, param.requires_grad, name)
        for name, buffer in module.named_buffers():
            keep(buffer, True, name)
    for i, tensor in enumerate(params):
        keep(tensor, tensor.requires_grad, names.get(tensor, f"parameter {i}"))
    return Begun(list(tensors.values()), [p for module in modules for p in _module_entries(module)])


def _check_fits(value: Tensor, tensor: Tensor, name: str) -> None:
    if value.shape != tensor.shape:
        raise RuntimeError(
            f"ema_weights(): {name} has shape {tuple(tensor.shape)}, its average "
            f"{tuple(value.shape)}"
        )
    if not placed_alike(value, tensor):
        raise RuntimeError(
            f"ema_weights(): {name} is {describe_placement(tensor)}, its average "
            f"{describe_placement(value)}"
        )


def _module_entries(root: nn.Module) -> Iterator[ModuleEntry]:
    for module in root.modules():
        caches = module._non_persistent_buffers_set
        for entries in (module._parameters, module._buffers):
            if isinstance(entries, dict):  # a ScriptModule has no dicts
                for name, value in entries.items():
                    yield ModuleEntry(entries, name, value, name not in caches)
