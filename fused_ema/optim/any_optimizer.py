"""The fused average for any other optimizer, moved after its steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from operator import is_
from types import FrameType
from typing import Any
from weakref import finalize, ref

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict
from torch.utils.hooks import RemovableHandle

from ..checks import check_choice
from ..ema.buffers import EmaBuffersMode
from ..ema.decay import EmaDecay, EmaOrder
from ..ema.formats import EmaFormat
from ..ema.teacher import Teacher
from ..rules.frozen import FROZEN
from ..step.backends import BackendName
from ..wrapped import unwrapped
from .base import FusedScaledOptimizer
from .groups import KAPPA
from .options import documented
from .stepping import Begun

# The attribute in which torch.optim.Optimizer keeps the hooks of its step.
HOOKS = "_optimizer_step_post_hooks"
# The code that runs around every step and calls the hooks.
STEP = Optimizer.profile_hook_step(lambda self: None).__code__


@documented
class FusedEMA(FusedScaledOptimizer):
    """Averages of the parameters of any ``torch.optim.Optimizer``, moved when it steps.

    ``zeta <- rho**kappa * zeta + (1 - rho**kappa) * theta`` (Busbridge et al. 2023, Definition
    1.2). A hook of ``optimizer.step()`` does this, with one launch a bucket. ``kappa`` scales the
    averages' decay alone; scaling the other optimizer's learning rate and the rest is up to you.
    The averages follow its param groups, including those that are added later; ``param_groups[i]``
    here may hold its own ``ema_decay`` and ``kappa``. A step that a ``GradScaler`` skips moves
    nothing.

    Use it like the averages of the fused optimizers: :meth:`ema_weights`, :meth:`ema_state_dict`,
    :meth:`copy_ema_to`, :attr:`kappa`. Its ``state_dict()`` holds the averages and their base
    steps; save it beside the optimizer's. Copying or pickling both together gives a working pair.

    Keep a reference to it as long as it should follow: the optimizer does not keep it alive, and
    dropping the last reference removes its hooks.

    Args:
        optimizer: the optimizer that steps the parameters, or a framework's wrapper around it; only
            the hook is added to it.
        {ema_decay, teacher, ema_order, ema_every, ema_format, rounding_seed}
        kappa: batch size / base batch size, a number ``> 0``; scales ``rho`` alone.
        {model, ema_buffers, capturable, backend}

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, whose hooks are needed.
        ValueError: the optimizer has averages of its own (pass ``ema_decay`` to it), or an argument
            has a bad value.
    """

    rule = FROZEN

    def __init__(
        self,
        optimizer: Optimizer,
        ema_decay: EmaDecay = None,
        *,
        teacher: Teacher | None = None,
        ema_order: EmaOrder = "after",
        ema_every: int = 1,
        ema_format: EmaFormat = "full",
        rounding_seed: int = 0,
        kappa: float = KAPPA,
        model: nn.Module | None = None,
        ema_buffers: EmaBuffersMode | None = None,
        capturable: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        optimizer = unwrapped(optimizer)
        # some wrappers are an Optimizer whose constructor never ran
        if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, HOOKS):
            raise TypeError(
                f"optimizer: received a {type(optimizer).__name__}; allowed: a "
                "torch.optim.Optimizer, whose step calls hooks"
            )
        if isinstance(optimizer, FusedScaledOptimizer):
            raise ValueError(
                f"optimizer: a {type(optimizer).__name__} has averages of its own; pass ema_decay "
                "to it"
            )
        check_choice("ema_order", ema_order, EmaOrder)
        if ema_decay is None:
            raise ValueError("ema_decay=None; allowed: a decay, a schedule or a tuple of those")
        self._order = ema_order
        self._optimizer = optimizer
        super().__init__(
            [_params(group) for group in optimizer.param_groups],
            {"foreach": None, "fused": None, "differentiable": False, "capturable": capturable},
            ema_decay=ema_decay,
            teacher=teacher,
            ema_every=ema_every,
            ema_format=ema_format,
            rounding_seed=rounding_seed,
            kappa=kappa,
            model=model,
            ema_buffers=ema_buffers,
            backend=backend,
        )
        self._removed = False
        self._ahead = Begun()
        self._attach()

    def remove(self) -> None:
        """Stop following the optimizer; the averages stay as they are."""
        self._unhook()
        self._removed = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every average, in place, as the hook does at each step of the optimizer.

        Raises:
            RuntimeError: inside :meth:`ema_weights`, or the optimizer now has other parameters.
            ValueError: a param group holds a bad value. Nothing moves in either case.
        """
        self._follow_groups()
        return super().step(closure)

    def state_dict(self) -> StateDict:
        """Return the averages and their base steps; see :meth:`FusedScaledOptimizer.state_dict`."""
        self._follow_groups()
        return super().state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this class; see :meth:`FusedScaledOptimizer.load_state_dict`."""
        self._follow_groups()
        super().load_state_dict(state_dict)

    def _ensure_state(self, begun: Begun) -> None:
        self._follow_groups()
        super()._ensure_state(begun)

    def _attach(self) -> None:
        """Add the hooks to the optimizer's step; they go when this object is freed."""
        optimizer, own = self._optimizer, ref(self)
        handles = (
            optimizer.register_step_pre_hook(partial(_before_step, own)),
            optimizer.register_step_post_hook(partial(_after_step, own)),
        )
        self._unhook = finalize(self, _remove, handles)
        self._unhook.atexit = False

    def _begin(self) -> None:
        """Create averages from the weights before the step, and refuse what cannot be averaged."""
        self._check_not_swapped("step()")
        self._release(self._take_ahead())  # the optimizer did not finish the step before
        self._follow_groups()
        with torch.inference_mode(False), torch.no_grad():
            self._prepared(self._ahead)

    def _take_step(self, begun: Begun | None = None) -> None:
        super()._take_step(self._take_ahead())

    def _take_ahead(self) -> Begun:
        """Hand over what :meth:`_begin` has created to the step that it belongs to."""
        begun, self._ahead = self._ahead, Begun()
        return begun

    def _follow(self, optimizer: Optimizer) -> None:
        # torch's fused optimizers read it there too
        self.found_inf = getattr(optimizer, "found_inf", None)
        try:
            self.step()
        finally:
            del self.found_inf

    def _follow_groups(self) -> None:
        if self._removed:
            return
        for own, other in zip_longest(self.param_groups, self._optimizer.param_groups):
            if own is None:
                self.add_param_group(_params(other))
            elif other is None or not _same(own["params"], other["params"]):
                raise RuntimeError(
                    "optimizer: its parameters have been replaced; make a new FusedEMA for them"
                )

    def __getstate__(self) -> dict[str, Any]:
        own = {"_optimizer": self._optimizer, "_order": self._order, "_removed": self._removed}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ahead = Begun()
        if "_optimizer" in state:  # a copy: the copied optimizer has no hooks
            self._attach()
            if self._removed:
                self._unhook()


@_disable_dynamo  # it would trace into the hooks
def _before_step(own: ref[FusedEMA], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    ema = own()
    if ema is None or ema._removed:
        return
    if ema._order == "before":
        ema._follow(optimizer)
    else:
        ema._begin()


@_disable_dynamo
def _after_step(own: ref[FusedEMA], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    ema = own()
    if ema is not None and not ema._removed and ema._order == "after":
        ema._follow(optimizer)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    if _is_stepping():
        return  # torch is iterating over the hooks now: these only stop having an effect
    for handle in handles:
        handle.remove()


def _is_stepping() -> bool:
    """Whether some optimizer is inside its step, in any thread."""
    frames: list[FrameType | None] = list(sys._current_frames().values())
    try:
        while frames:
            frame = frames.pop()
            while frame is not None and frame.f_code is not STEP:
                frame = frame.f_back
            if frame is not None:
                return True
        return False
    finally:
        frames, frame = [], None  # breaks a cycle: one of the frames is this function's own


def _params(group: dict[str, Any]) -> dict[str, Any]:
    params = group["params"]
    if "param_names" in group:
        params = zip(group["param_names"], params, strict=True)
    return {"params": list(params)}


def _same(own: list[Any], other: list[Any]) -> bool:
    return len(own) == len(other) and all(map(is_, own, other))
