"""An optimizer's step, taken as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..dtypes import is_fixed, is_there
from ..ema.access import EmaAccess
from ..ema.buffers import BUFFERS, EmaBuffers, moving
from ..ema.teacher import named
from ..extension import native
from ..rules.rule import Rule
from ..step import clock
from ..step.folding import Checked
from ..step.gradients import Measured, Treatment, Verdict
from ..step.plans import Plans
from ..step.state import ensure
from ..step.stepper import Stepper
from ..together import Call, together
from . import checkpoint, replaced
from .groups import agreed, check_group


class Begun:
    """New state of a step, which is dropped if the step is not taken.

    Attributes:
        keys: for each parameter, the keys that its state did not hold before.
        buffers: the averaged buffers as they were; None if they have not been read.
        kept: whether the step is taken.
    """

    keys: Sequence[tuple[Tensor, set[str]]] = ()
    buffers: list[dict[str, Tensor]] | None = None
    kept = False


class Doubt:
    """A step that was counted on the host, and may have been skipped on the device.

    Args:
        found_inf: a tensor, not 0 if the step is skipped.
        begun: the step's new state.
        counted: the metadata whose counts include the step.
        put_back: calls that restore the groups' counts.
    """

    def __init__(
        self, found_inf: Tensor, begun: Begun, counted: list[native.Slots], put_back: list[Call]
    ) -> None:
        self.verdict = Verdict(found_inf)
        self.begun = begun
        self.counted = counted
        self.put_back = put_back


class UnscalesItself:
    """Whether ``step()`` unscales gradients; torch's ``GradScaler`` and trainers ask for it.

    True if every param group has ``fused=True``, as in torch. An attribute of the same name on the
    optimizer itself takes precedence.
    """

    def __get__(self, optimizer: Stepping | None, owner: type) -> bool:
        return optimizer is not None and all(group["fused"] for group in optimizer.param_groups)


class Stepping(EmaAccess):
    """Steps and the state they create; :class:`~fused_ema.FusedScaledOptimizer` has the rest."""

    rule: ClassVar[Rule]
    backend: str
    _stepper: Stepper
    _doubt: Doubt | None
    _grad_norm: Tensor | None
    _known_params: list[list[Tensor]]

    _step_supports_amp_scaling = UnscalesItself()
    _measured: Measured | None = None  # set during the step of our scaler

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradients before clipping, over all parameters.

        A 0-dim float64 tensor (float32 on Apple's GPUs) on the first parameter's device, of
        unscaled gradients if a ``GradScaler`` is in use; 0 on the CPU if there are no parameters.
        Reading it does not wait for the device. None before the first step, and without
        ``max_grad_norm`` (``math.inf`` computes the norm and clips nothing).
        """
        return self._grad_norm

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends in use, one a bucket; empty before the first step."""
        return self._stepper.backends

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter and move every average, in place.

        If ``torch.amp.GradScaler`` calls it with ``fused=True``, or :class:`~fused_ema.GradScaler`
        does, it unscales gradients on their way into the rule. If one of them is not finite,
        nothing moves and nothing is counted. The host counts the steps of groups that are not
        capturable: the kernels skip, and the next step or :meth:`state_dict` takes the count back,
        so that no step waits for its own check (with ``"foreach"`` and ``"reference"`` it does).

        ``torch.compile`` breaks its graph here: the step runs uncompiled, and a closure is
        compiled. Write to ``param_groups`` outside of compiled code, which would make torch set
        their ``capturable`` to True.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The result of ``closure``; None without one.

        Raises:
            RuntimeError: inside :meth:`ema_weights`, a gradient is sparse, or the backend cannot
                step the parameters.
            ValueError: a param group holds a bad value. Nothing moves in either case.
        """
        self._check_not_swapped("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._check_not_swapped("step()")
        self._take_step()
        return loss

    @_disable_dynamo  # it would compile fragments of the step; it may compile a closure
    def _take_step(self, begun: Begun | None = None) -> None:
        begun = Begun() if begun is None else begun
        try:
            if torch.is_inference_mode_enabled():
                # a later step outside could not use the tensors that a plan makes there
                with torch.inference_mode(False), torch.no_grad():
                    self._move(begun)
            else:
                self._move(begun)
        except BaseException:
            self._release(begun)
            raise

    def check_gradients(self) -> Tensor:
        """Return 1 if a gradient is not finite, else 0: a 0-dim float32 tensor, from one read pass.

        Nothing is moved, and nothing waits for the device.
        """
        return self._measure(None, "check_gradients()").found_inf

    @torch.no_grad()
    def _measure(self, scale: Tensor | None, what: str) -> Measured:
        """Read the gradients for ``what``, before a step that divides them by ``scale``."""
        self._check_not_swapped(what)
        begun = Begun()
        try:
            with torch.inference_mode(False):
                plans = self._prepared(begun)
                max_norm = agreed(self.param_groups, "max_grad_norm")
                treatment = Treatment(scale, max_norm=max_norm, checked=True)
                control = plans.control(treatment)
                return Measured(treatment, control, control.found_inf, plans.gradients())
        finally:
            self._release(begun)

    def _prepared(self, begun: Begun) -> Plans:
        """Prepare the current step; ``begun`` records the state that it creates."""
        if self._doubt is not None:  # cheaper than dynamo's guard around the call
            self._settle()
        return self._stepper.prepare(
            self.param_groups,
            self.state,
            self._check_group,
            partial(self._ensure_state, begun),
            clock.is_due(self.param_groups, agreed(self.param_groups, "ema_every")),
        )

    def _move(self, begun: Begun) -> None:
        plans = self._prepared(begun)
        averaged, kappas = plans.averaged, self._stepper.folder.kappas
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            found_inf = None  # torch's GradScaler sums over the gradients it has seen: 0 for none
        max_norm = agreed(self.param_groups, "max_grad_norm")
        scale = getattr(self, "grad_scale", None)
        measured = self._measured
        if measured is not None:
            treatment = Treatment(scale, found_inf, max_norm)
            measured = measured if plans.takes(measured, treatment) else None
        if found_inf is not None and not plans.skips:
            if found_inf.item() != 0.0:
                self._release(begun)
                return
            found_inf = None
        moves = []
        if self._buffers is not None and averaged:
            moves = self._buffers.moves(self._buffer_rates())
        control = None
        if measured is not None:
            control = measured.control
        elif not (scale is None and found_inf is None and max_norm is None):
            control = plans.control(Treatment(scale, found_inf, max_norm))
        if max_norm is not None and control is not None:
            self._grad_norm = control.norm
        doubt = None
        if found_inf is not None and plans.host_counted:
            put_back = clock.restoring_counts(self.param_groups)
            doubt = Doubt(found_inf, begun, plans.counted(), put_back)
        calls = plans.running(control)
        calls += clock.advance(self.param_groups, kappas, control, plans.clocked)
        if self.param_groups[0]["ema_every"] > 1:
            calls += clock.count_skips(self.param_groups, kappas, averaged)
        if moves:
            calls += moving(moves, None if control is None else control.taken)
        if doubt is not None or self._doubt is not None:
            calls.append(partial(setattr, self, "_doubt", doubt))
        calls.append(partial(setattr, begun, "kept", True))
        if averaged:
            self._teachers.reshard()  # drops the full copies; nothing reads them in between
        together(calls)

    @_disable_dynamo
    def _settle(self) -> None:
        """Take the counts of the last step back if a ``GradScaler`` had it skipped.

        The host counts a step before the device knows whether it is taken, and asks when it needs
        the counts again. So ``step()`` waits for at most the step before.
        """
        doubt = self._doubt
        if doubt is not None and doubt.verdict.skipped():
            uncounting = [partial(slots.uncount) for slots in doubt.counted]
            together([*doubt.put_back, *uncounting, partial(setattr, self, "_doubt", None)])
            self._drop(doubt.begun)
        self._doubt = None

    def _release(self, begun: Begun) -> None:
        """Release the gradients and the new state of a step that is not taken."""
        self._stepper.release()
        if not begun.kept:
            self._drop(begun)

    def _drop(self, begun: Begun) -> None:
        if begun.buffers is None:
            return
        for param, keys in begun.keys:
            state = self.state.get(param, {})
            for key in keys & state.keys():
                del state[key]
            if not state:
                self.state.pop(param, None)
        if self._buffers is not None:
            self._buffers.averages = begun.buffers
        self._stepper.forget()

    def _ensure_state(self, begun: Begun) -> None:
        self._follow_replaced()
        if begun.buffers is None:
            begun.buffers = [] if self._buffers is None else list(map(dict, self._buffers.averages))
        before = [(param, set(self.state.get(param, ()))) for param in self._params()]
        try:
            # a later step could not write to an average made under the user's inference_mode
            with torch.inference_mode(False), torch.no_grad():
                self._ensure_all()
        finally:
            new = ((param, self.state.get(param, {}).keys() - keys) for param, keys in before)
            begun.keys = [*begun.keys, *((param, keys) for param, keys in new if keys)]

    def _ensure_all(self) -> None:
        for group in self.param_groups:
            clock.ensure_counter(group)
            for param in group["params"]:
                if not is_there(param) or is_fixed(param):
                    continue
                teacher = self._teachers.tensors.get(param)
                ensure(self.rule, group, param, self.state[param], teacher)
        if self._buffers is not None:
            self._begin_buffers(self._buffers)
            return
        for param in self._params():
            if self.state.get(param, {}).pop(BUFFERS, None) is not None:
                checkpoint.warn_about_buffers(stacklevel=2)

    def _follow_replaced(self) -> None:
        """Move state to the parameters that have replaced others in the param groups."""
        if self._buffers is not None:
            self._names.update(named(self._buffers.model))
        for group in self.param_groups:
            self._names.update(zip(group["params"], group.get("param_names", ()), strict=False))
        self._teachers.renew(self._names, self.state)
        teachers = self._teachers.tensors
        replaced.follow(self._known_params, self.param_groups, self._names, self.state, teachers)
        self._known_params = [list(group["params"]) for group in self.param_groups]

    def _begin_buffers(self, buffers: EmaBuffers) -> None:
        """Create averaged buffers, and put them into the state where checkpoints find them."""
        buffers.begin(self._num_emas())
        entry, home = buffers.entry(), checkpoint.home(self.param_groups)
        for param in self._params():
            self.state.get(param, {}).pop(BUFFERS, None)
        if entry and home is not None:
            self.state[home][BUFFERS] = entry

    def _buffer_rates(self) -> tuple[float, ...]:
        """The EMA rates of the group with the most averages, because buffers belong to no group."""
        rates = [self._stepper.folder.ema_rates(i) for i in range(len(self.param_groups))]
        return max(rates, key=len)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _check_group(self, group: Mapping[str, Any]) -> Checked:
        return check_group(self.rule, group, self.backend)
