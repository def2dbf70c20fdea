"""Reads averages that other packages have saved into an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..dtypes import COMPUTE_DTYPE, weight_of
from ..names import renamed
from ..wrapped import unwrapped
from .access import EmaAccess
from .averages import begin_average
from .decay import ema_keys
from .formats import DTYPES, check_distance, stored, write
from .modules import state_dict


class LoadedEma(NamedTuple):
    """What :func:`load_ema` has read.

    Attributes:
        layout: the package whose layout the state has.
        updates: number of updates of that average; None if the state does not say.
        unused: names of the model's entries that the state holds but the optimizer does not
            average.
    """

    layout: str
    updates: int | None
    unused: tuple[str, ...]


class Layout(NamedTuple):
    """How a package saves its average; a state that holds all ``marks`` is from it."""

    name: str
    marks: frozenset[str]
    entries: Callable[[Mapping[str, Any], nn.Module], dict[str, Any]]
    updates: str | None = None
    buffers: bool = True


def load_ema(
    optimizer: EmaAccess, model: nn.Module, state: Mapping[str, Any], index: int = 0
) -> LoadedEma:
    """Copy an average that another package has saved into an optimizer, in place.

    ``state`` is the ``state_dict()`` of torch's ``AveragedModel``, timm's ``ModelEmaV3``,
    ema-pytorch's ``EMA`` or diffusers' ``EMAModel``, recognised by its keys, or of a plain module.
    That module and ``model`` may be wrapped in DistributedDataParallel or torch.compile. Averages
    keep their dtype and memory, so that a teacher stays the average; weights and the model's own
    buffers are not touched. Load the weights first if ``ema_format="delta"`` stores the average as
    a difference to them. If the state counts its updates, ``base_steps`` of every param group
    becomes that number, so that schedules continue; each update of another package counts as one
    base step.

    Args:
        optimizer: the optimizer that holds the average, and its averaged buffers if there are any
            (``ema_buffers="average"`` or a teacher with buffers); modified in place.
        model: the optimized module, or a part of it, which names the averages. diffusers' tensors
            have no names: they belong to the module's parameters in order, to all of them or, if
            the number of tensors says so, to those that require a gradient.
        state: the state dict described above; not modified.
        index: which average, for a tuple ``ema_decay``.

    Raises:
        ValueError: a name, shape, dtype or count does not fit (the message names the first), or
            ``model`` holds none of the averaged parameters. Nothing changes then.
        IndexError: there is no such average.
        RuntimeError: inside ``ema_weights()``.
    """
    optimizer = unwrapped(optimizer)
    optimizer._check_not_swapped("load_ema()")
    if not isinstance(state, Mapping):
        raise ValueError(f"state: received a {type(state).__name__}; allowed: a state dict")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"model: {name!r} has no shape yet; allowed: after the first forward of its module"
            )
    layout = next(known for known in LAYOUTS if known.marks <= state.keys())
    begun = _begun(optimizer, index)
    buffers = optimizer._buffers
    held = [] if buffers is None else list(map(dict, buffers.averages))
    try:
        if buffers is not None:
            buffers.begin(optimizer._num_emas())
        return _load(optimizer, model, state, index, layout)
    except BaseException:
        if buffers is not None:
            buffers.averages = held
        for param, before in begun:
            if before:
                optimizer.state[param].pop(ema_keys(index + 1)[-1])
            else:
                del optimizer.state[param]
        raise


def _begun(optimizer: EmaAccess, index: int) -> list[tuple[Tensor, dict[str, Any]]]:
    """Create the averages that a first step would; returns the states from before."""
    read = optimizer._averages(index)
    key = ema_keys(index + 1)[-1]
    teachers = optimizer._teachers.tensors if index == 0 else {}
    changed = []
    with torch.inference_mode(False), torch.no_grad():
        for group in optimizer.param_groups:
            for param in group["params"]:
                before = optimizer.state.get(param, {})
                if param in read and before.get(key) is None and param.dtype in COMPUTE_DTYPE:
                    changed.append((param, dict(before)))
                    begin_average(key, param, optimizer.state[param], group, teachers.get(param))
    return changed


def _load(
    optimizer: EmaAccess,
    model: nn.Module,
    state: Mapping[str, Any],
    index: int,
    layout: Layout,
) -> LoadedEma:
    entries = renamed(layout.entries(state, model), model.state_dict())
    held = _held(optimizer, model, index)
    _check_names(entries, model, _required(held, model, layout))
    used = {name: entries[name] for name in held if name in entries}
    for name, value in used.items():
        _check_value(name, value, held[name])
    differences = _differences(optimizer, model, index)
    for name in used.keys() & differences.keys():
        check_distance(f"state: {name!r}", used[name], differences[name].weight)
    updates = _updates(state, layout)
    with torch.no_grad():
        for name, value in used.items():
            if name in differences:
                differences[name].hold(value)
            else:
                held[name].copy_(value)
    if updates is None:
        optimizer._knows_of_young = True  # it does not begin here
    else:
        _set_base_steps(optimizer, updates)
    return LoadedEma(layout.name, updates, tuple(sorted(entries.keys() - held.keys())))


def _prefixed(prefix: str, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The entries of a module's state dict, which ``state`` holds under ``prefix``."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _shadows(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The tensors of diffusers, which have no names, under their parameters' names."""
    shadows = state["shadow_params"]
    named = _named_parameters(model)
    trained = [name for name, param in named if param.requires_grad]
    names = [name for name, _ in named] if len(shadows) == len(named) else trained
    if len(shadows) != len(names):
        raise ValueError(
            f"state: 'shadow_params' holds {len(shadows)} tensors; allowed: {len(named)}, the "
            f"model's parameters, or {len(trained)}, those that require a gradient"
        )
    return dict(zip(names, shadows, strict=True))


LAYOUTS = (
    Layout(
        "diffusers.EMAModel",
        frozenset({"shadow_params", "optimization_step"}),
        _shadows,
        updates="optimization_step",
        buffers=False,
    ),
    Layout(
        "ema_pytorch.EMA",
        frozenset({"initted", "step"}),
        partial(_prefixed, "ema_model."),
        updates="step",
    ),
    Layout(
        "torch.optim.swa_utils.AveragedModel",
        frozenset({"n_averaged"}),
        partial(_prefixed, "module."),
        updates="n_averaged",
    ),
    Layout("module", frozenset(), partial(_prefixed, "")),  # ModelEmaV3's too
)


def _named_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The model's parameters, each once, under their keys in its state dict."""
    first: dict[Tensor, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            first.setdefault(value, name)
    return [(first[param], param) for param in model.parameters() if param in first]


def _held(optimizer: EmaAccess, model: nn.Module, index: int) -> dict[str, Tensor]:
    """The tensors of the average that the optimizer holds, not the model."""
    averages, buffers = optimizer._averages(index), optimizer._averaged_buffers(index)
    average, own = state_dict(model, averages, buffers), model.state_dict()
    return {
        name: value
        for name, value in average.items()
        if isinstance(value, Tensor) and not value.is_set_to(own[name])
    }


class _Difference(NamedTuple):
    """An average stored as a scaled difference, and the weights that it is relative to."""

    held: Tensor
    weight: Tensor

    def hold(self, value: Tensor) -> None:
        write(self.held, lambda v, w: stored(v.to(w.device), w, "delta"), value, self.weight)


def _differences(optimizer: EmaAccess, model: nn.Module, index: int) -> dict[str, _Difference]:
    key = ema_keys(index + 1)[-1]
    found = {}
    for name, param in _named_parameters(model):
        state = optimizer.state.get(param, {})
        if key in state and state[key].dtype == DTYPES["delta"]:
            found[name] = _Difference(state[key], weight_of(param, state))
    return found


def _required(held: Iterable[str], model: nn.Module, layout: Layout) -> list[str]:
    """The names that a state must have."""
    params = {name for name, _ in _named_parameters(model)}
    return [name for name in held if layout.buffers or name in params]


def _check_names(entries: Iterable[str], model: nn.Module, required: Iterable[str]) -> None:
    allowed = model.state_dict()
    for name in entries:
        if name not in allowed:
            raise ValueError(f"state: {name!r} is not in the model; allowed: its state_dict's keys")
    for name in required:
        if name not in entries:
            raise ValueError(f"state: {name!r} is missing; allowed: every entry of the average")


def _check_value(name: str, value: Any, held: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"state: {name!r} is a {type(value).__name__}; allowed: a tensor")
    if value.shape != held.shape:
        raise ValueError(
            f"state: {name!r} has shape {tuple(value.shape)}; allowed: the average's "
            f"{tuple(held.shape)}"
        )
    if not torch.can_cast(value.dtype, held.dtype):
        raise ValueError(
            f"state: {name!r} has dtype {value.dtype}; allowed: what casts to the average's "
            f"{held.dtype}"
        )


def _updates(state: Mapping[str, Any], layout: Layout) -> int | None:
    if layout.updates is None:
        return None
    value = state[layout.updates]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not (isinstance(value, int | float) and value >= 0 and float(value).is_integer()):
        raise ValueError(f"state: {layout.updates!r} is {value!r}; allowed: a count >= 0")
    return int(value)


def _set_base_steps(optimizer: EmaAccess, updates: int) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["base_steps"], Tensor):
            group["base_steps"].fill_(updates)  # in place: a captured graph counts in this tensor
        else:
            group["base_steps"] = float(updates)
