"""Reading the averages of an optimizer: in place of the weights, or as a module's state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from . import averages
from .ema import decays, ema_keys
from .ema_buffers import EmaBuffers
from .formats import average
from .sharding import fsdp_modules, is_sharded, reshard, resharded
from .state import weights
from .swap import swapped


class EmaAccess(Optimizer):
    """What a user does with averages that an optimizer holds in ``state[p]["ema"]``, ..."""

    _names: dict[Tensor, str]
    _buffers: EmaBuffers | None
    _swapped: bool
    _teacher_modules: list[Any]

    def _complete_state(self) -> None:
        """Give every parameter the averages that its group asks for."""
        raise NotImplementedError

    @contextmanager
    def ema_weights(self, index: int = 0) -> Iterator[None]:
        """Hold an average in the parameters, in place, while the context is open.

        ``with opt.ema_weights(): evaluate(model)``. On exit, also by an exception, weights and
        averages are restored bit by bit. Averaged buffers trade places too. FSDP2's modules are
        resharded on entry and exit.

        Args:
            index: which average, for a tuple ``ema_decay``.

        Raises:
            IndexError: there is no such average.
            RuntimeError: already inside; ``step()``, ``state_dict()`` and ``load_state_dict()``
                raise it inside. Or DTensor parameters without ``model=``.
        """
        by_param = self._averages(index, "ema_weights()")
        pairs = list(by_param.items())
        if self._buffers is not None:
            pairs += self._buffers.pairs(index)
        with resharded(self._fsdp_modules(by_param)), swapped(pairs):
            self._swapped = True
            try:
                yield
            finally:
                self._swapped = False

    def ema_state_dict(self, model: nn.Module, index: int = 0) -> dict[str, Tensor]:
        """An average under the keys of ``model.state_dict()``.

        Args:
            model: the module whose parameters are optimized here. Entries that are not averaged
                (parameters of no group, buffers unless ``ema_buffers`` holds them) are its own.
            index: which average, for a tuple ``ema_decay``.

        Returns:
            Tensors that share memory with the optimizer's, but for averages that are kept as
            differences; averages keep their dtype. Those of DTensors are DTensors.

        Raises:
            ValueError: ``model`` holds none of the averaged parameters.
            IndexError: there is no such average.
        """
        by_param = self._averages(index, "ema_state_dict()")
        return averages.state_dict(model, by_param, self._held_buffers(index))

    def copy_ema_to(self, model: nn.Module, index: int = 0) -> None:
        """Copy an average into a module's parameters and buffers, in place.

        Buffers are copied where ``model=`` made the student's known; parameters that have no
        average are left as they are. An average in shards is gathered for a module that is not
        sharded: every process must call it.

        Args:
            model: the optimized module itself, a part of it, or another of the same shapes: paired
                by name where names are known (``model=`` or ``named_parameters()``), else in order.
            index: which average, for a tuple ``ema_decay``.

        Raises:
            ValueError: a name or shape does not match; the message names the first.
            IndexError: there is no such average.
        """
        by_param = self._averages(index, "copy_ema_to()")
        names = {**self._names, **(self._buffers.names() if self._buffers is not None else {})}
        in_order = len(self._averaged_groups()) == 1
        reshard(fsdp_modules(model))
        averages.copy_to(model, by_param, self._held_buffers(index), names, in_order)

    def _fsdp_modules(self, params: Iterable[Tensor]) -> list[Any]:
        """FSDP2's modules around the parameters and around their teacher."""
        if self._buffers is not None:
            return [*fsdp_modules(self._buffers.model), *self._teacher_modules]
        if any(map(is_sharded, params)):
            raise RuntimeError(
                "ema_weights() with DTensor parameters: their modules may hold full copies of "
                "them, and are not known; give the optimizer model=<the module>"
            )
        return []

    def _held_buffers(self, index: int) -> dict[Tensor, Tensor]:
        return self._buffers.values(index) if self._buffers is not None else {}

    def _averaged_groups(self) -> list[int]:
        return [i for i, group in enumerate(self.param_groups) if decays(group["ema_decay"])]

    def _num_emas(self) -> int:
        return max(len(decays(group["ema_decay"])) for group in self.param_groups)

    def _averages(self, index: int, what: str) -> dict[Tensor, Tensor]:
        """The average ``index`` of every parameter that has it."""
        self._check_not_swapped(what)
        self._complete_state()
        key = ema_keys(index + 1)[-1] if index >= 0 else ""
        found = {
            param: average(self.state[param][key], weights(param, self.state[param]))
            for group in self.param_groups
            if 0 <= index < len(decays(group["ema_decay"]))
            for param in group["params"]
        }
        if not found:
            raise IndexError(f"index={index}: no param group has that average; see ema_decay")
        return found

    def _check_not_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(
                f"{what} inside ema_weights(): the parameters hold the average; leave the context "
                "first"
            )
