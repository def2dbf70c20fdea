"""Access to an optimizer's averages: in place of the weights, or as a module's state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..dtypes import is_fixed, is_there
from ..sharding import fsdp_modules, is_sharded, reshard
from . import modules, young
from .averages import held_average
from .buffers import EmaBuffers
from .decay import decays, ema_keys
from .swap import Begun, Flag, Swap, begun
from .teachers import Teachers


class EmaAccess(Optimizer):
    """The user's access to the averages that an optimizer holds in ``state[p]["ema"]``, ..."""

    _names: dict[Tensor, str]
    _buffers: EmaBuffers | None
    _swap_flag: Flag
    _teachers: Teachers
    # whether the user knows how young an average is: they were warned, or began it elsewhere
    _knows_of_young = False

    def _follow_groups(self) -> None:
        """Add the param groups that another optimizer has gained and this one must follow."""

    def _settle(self) -> None:
        """Undo the counts and the new state of a step that was skipped."""

    @_disable_dynamo  # compiled code must not trace the swap
    def ema_weights(self, index: int = 0, *, model: nn.Module | None = None) -> Swap:
        """Put an average into the parameters, in place, while the context is open.

        ``with opt.ema_weights(): evaluate(model)``. The exit restores the weights bit by bit, even
        if an exception or a signal handler that raises at any time ends the body, and whatever has
        happened to the module inside: dtype casts, moves, writes in place. It restores the buffers
        of a known module too (``model=`` here or in the constructor); averaged buffers take their
        place meanwhile. Averages and masters are not touched. Before the first step the average is
        the weights (or the teacher), and no state is created. FSDP2's modules are resharded on
        entry and exit.

        While it is open, the context holds a copy of the weights and buffers. Parameters keep their
        memory. Gradients are the user's: the exit undoes a cast of them, but not a write to them.
        The context keeps no copy of frozen parameters without an average: the exit undoes a cast,
        and raises after a write in place (except one through ``.data``, which cannot be detected).

        An average is of use once it has forgotten the weights that it began with: a decay of 0.9999
        takes 10,000 base steps, ``1/(1 - rho)``. The first read before that warns with a
        :class:`~fused_ema.YoungAverageWarning`, once an optimizer (here, in :meth:`ema_state_dict`
        and :meth:`copy_ema_to`). Shorter runs need a smaller decay, or a schedule that warms up,
        such as :class:`~fused_ema.WarmUpDecay`. Schedules and teachers, which begin at values of
        your own, do not warn.

        As with all tensors that are modified in place, a graph made outside cannot run backward
        inside, and a graph made inside cannot run backward outside. A graph made before the context
        can run backward after it.

        If several optimizers train parts of one model, nest the contexts of all of them
        (``contextlib.ExitStack``).

        Args:
            index: which average, for a tuple ``ema_decay``.
            model: the module that holds the parameters; needed if the optimizer does not know it.

        Returns:
            A context manager, to be entered once, or a decorator.

        Raises:
            IndexError: there is no such average.
            ValueError: ``model`` is not a module, or holds none of the averaged parameters.
            RuntimeError: on entry: the context is already open (inside it, ``step()``,
                ``state_dict()`` and ``load_state_dict()`` raise too, in every thread), parameters
                are DTensors and ``model=`` is missing, or an average does not have its parameter's
                shape. On exit: something could not be restored; the message names it, and the rest
                is restored.
        """
        modules = self._modules_around(model)
        begin = partial(self._begin_swap, index, model, modules)
        return Swap(self._swap_flag, begin, partial(_reshard, modules))

    def _modules_around(self, model: nn.Module | None) -> list[nn.Module]:
        """The known modules that hold the parameters."""
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model: received a {type(model).__name__}; allowed: a module")
        known = self._buffers.model if self._buffers is not None else None
        return [module for module in (model, known) if module is not None]

    def _begin_swap(
        self, index: int, model: nn.Module | None, modules: Sequence[nn.Module]
    ) -> Begun:
        by_param = self._averages(index)
        self._warn_of_young("ema_weights()", index)
        if model is not None and set(by_param).isdisjoint(model.parameters()):
            raise ValueError("model holds none of the optimizer's averaged parameters")
        if not modules and any(map(is_sharded, by_param)):
            raise RuntimeError(
                "ema_weights() with DTensor parameters: their modules, which may hold full copies "
                "of them, are not known; pass model=<the module> to the optimizer, or here"
            )
        _reshard(modules)  # first, so that modules and optimizer hold the same tensors
        if self._buffers is not None:
            by_param |= self._buffers.pairs(index)
        params = (param for group in self.param_groups for param in group["params"])
        return begun(by_param, params, self._names, modules)

    def ema_state_dict(self, model: nn.Module, index: int = 0) -> dict[str, Tensor]:
        """Return an average under the keys of ``model.state_dict()``.

        Args:
            model: the module whose parameters this optimizer trains. Entries without an average
                (parameters of no group, buffers unless ``ema_buffers`` averages them) are the
                module's own.
            index: which average, for a tuple ``ema_decay``.

        Returns:
            Tensors that share memory with the optimizer's, except averages stored as differences.
            Averages keep their dtype. The averages of DTensors are DTensors.

        Raises:
            ValueError: ``model`` holds none of the averaged parameters.
            IndexError: there is no such average.
        """
        self._check_not_swapped("ema_state_dict()")
        by_param = self._averages(index)
        self._warn_of_young("ema_state_dict()", index)
        return modules.state_dict(model, by_param, self._averaged_buffers(index))

    def copy_ema_to(self, target: nn.Module, index: int = 0, *, buffers: bool = True) -> None:
        """Copy an average into a module's parameters and buffers, in place.

        Another module then computes what the optimized one computes inside :meth:`ema_weights`: it
        also gets the parameters of groups without an average, as they are, and the student's
        buffers, for which the optimizer needs ``model=``. Parameters that are not the optimizer's
        are left alone. A sharded average is gathered for a module that is not sharded; every
        process must then make this call.

        If the target is the optimized module itself, training continues from the average. Masters
        take its values too, and no average changes, not even one stored as a difference to the
        weights.

        Args:
            target: the optimized module itself, a part of it, or another module of the same shapes.
                Tensors are paired by name if names are known (``model=`` or
                ``named_parameters()``), otherwise in order. Wrappers around either module
                (DistributedDataParallel, torch.compile) do not matter.
            index: which average, for a tuple ``ema_decay``.
            buffers: False leaves the target's buffers as they are.

        Raises:
            ValueError: a name or shape does not match, or the target's state dict has a buffer and
                the student's is not known; the message names the first. Nothing is copied then.
            IndexError: there is no such average.
        """
        self._check_not_swapped("copy_ema_to()")
        by_param = self._averages(index)
        self._warn_of_young("copy_ema_to()", index)
        rest = [p for group in self.param_groups for p in group["params"] if p not in by_param]
        held: dict[str, tuple[Tensor, Tensor]] | None = None
        if buffers:
            held = self._buffers.by_name(index) if self._buffers is not None else {}
        in_order = len(self._averaged_groups()) == 1
        own = [param for param in target.parameters() if param in by_param]
        rewrites = [modules.Rewrite(p, by_param[p], self.state.get(p, {})) for p in own]
        reshard(fsdp_modules(target))
        modules.copy_to(target, by_param, rest, self._names, in_order, held)
        for rewrite in rewrites:
            rewrite.finish()

    def _averaged_buffers(self, index: int) -> dict[Tensor, Tensor]:
        return self._buffers.values(index) if self._buffers is not None else {}

    def _averaged_groups(self) -> list[int]:
        return [i for i, group in enumerate(self.param_groups) if decays(group["ema_decay"])]

    def _groups_with(self, index: int) -> list[dict[str, Any]]:
        """The param groups that have the average ``index``."""
        return [g for g in self.param_groups if 0 <= index < len(decays(g["ema_decay"]))]

    def _num_emas(self) -> int:
        return max(len(decays(group["ema_decay"])) for group in self.param_groups)

    def _averages(self, index: int) -> dict[Tensor, Tensor]:
        """The average ``index`` of every parameter that has it; reading creates no state."""
        self._follow_groups()
        self._settle()
        if self._num_emas() == 0:
            raise IndexError(
                f"index={index}: no param group has that average; the optimizer was made without "
                "ema_decay"
            )
        key = ema_keys(index + 1)[-1] if index >= 0 else ""
        groups = self._groups_with(index)
        if not groups:
            raise IndexError(f"index={index}: no param group has that average; see ema_decay")
        teachers = self._teachers.tensors if index == 0 else {}
        # tensors made under the user's inference_mode could not be written to outside it
        with torch.inference_mode(False), torch.no_grad():
            return {
                param: teachers.get(param, param)
                if is_fixed(param)
                # .get() of a defaultdict adds no entry
                else held_average(key, param, self.state.get(param, {}), teachers.get(param))
                for group in groups
                for param in filter(is_there, group["params"])
            }

    @_disable_dynamo  # it looks at the callers
    def _warn_of_young(self, what: str, index: int) -> None:
        """Warn, once an optimizer, if an average that it began itself has seen too few steps."""
        if self._knows_of_young:
            return
        teachers = self._teachers.tensors if index == 0 else {}
        groups = [
            group
            for group in self._groups_with(index)
            if any(param not in teachers for param in group["params"])
        ]
        found = young.youngest(groups, index)
        if found is not None:
            self._knows_of_young = True
            young.warn(what, found)

    def _check_not_swapped(self, what: str) -> None:
        if self._swap_flag.swapped:
            self._swap_flag.check(what)


def _reshard(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        reshard(fsdp_modules(module))
