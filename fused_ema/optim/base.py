"""The base of the drop-in optimizers: torch's interface around plans that step whole buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from ..checks import check_choice
from ..dtypes import is_fixed, is_there
from ..ema.access import EmaAccess
from ..ema.buffers import BUFFERS, EmaBuffers, EmaBuffersMode, Moves, moving, resolve
from ..ema.decay import EmaDecay, EmaOrder
from ..ema.formats import EmaFormat, StateFormat
from ..ema.swap import Flag
from ..ema.teacher import Teacher, check_buffers_given, named
from ..ema.teachers import Teachers
from ..extension import native
from ..rules.frozen import FROZEN
from ..rules.rule import Rule
from ..step import clock
from ..step.backends import BackendName
from ..step.folding import Checked
from ..step.gradients import Measured, Treatment, Verdict
from ..step.state import check_param, complete, reset
from ..step.stepper import Stepper
from ..together import Call, together
from ..values import as_given, number
from . import checkpoint, replaced
from .checkpoint import ASKED
from .groups import KAPPA, agreed, check_group, check_groups
from .options import documented


class _Begun(NamedTuple):
    """State that a step has let begin, to be dropped where that step is not taken."""

    keys: list[tuple[Tensor, set[str]]]
    held: list[dict[str, Tensor]]
    """Averaged buffers as they were."""


class _Doubt(NamedTuple):
    """A step that was counted, and may have been skipped."""

    verdict: Verdict
    begun: _Begun | None
    counted: list[native.Slots]
    put_back: list[Call]


class _UnscalesItself:
    """Whether ``step()`` is to unscale: what torch's ``GradScaler`` and trainers ask an optimizer.

    True where every param group says ``fused=True``, as torch's constructors have it. An attribute
    of the same name on the optimizer itself wins.
    """

    def __get__(self, optimizer: FusedScaledOptimizer | None, owner: type) -> bool:
        return optimizer is not None and all(group["fused"] for group in optimizer.param_groups)


@documented
class FusedScaledOptimizer(EmaAccess):
    """Base of the optimizers: one fused pass a bucket for the step and every average.

    ``fused=True`` unscales inside the step under a ``torch.amp.GradScaler``, in the same pass.
    Without it the scaler unscales ``.grad`` before, as with torch's default, so that trainers may
    clip in between, and does not call :meth:`step` where a gradient is not finite;
    :class:`~fused_ema.optim.grad_scaler.GradScaler` takes the one pass in either case.

    Subclasses set :attr:`rule` and give the defaults of torch's namesake.

    Args:
        {params}
        defaults: the rule's hyper-parameters at the base batch size.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    rule: ClassVar[Rule]

    _step_supports_amp_scaling = _UnscalesItself()
    _measured: Measured | None = None  # while our scaler's step lasts
    _made = True  # False while the constructor adds its param groups

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        ema_decay: EmaDecay = None,
        teacher: Teacher | None = None,
        ema_order: EmaOrder = "after",
        ema_every: int = 1,
        ema_format: EmaFormat = "full",
        rounding_seed: int = 0,
        kappa: float = KAPPA,
        model: nn.Module | None = None,
        ema_buffers: EmaBuffersMode | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_format: StateFormat = "full",
        backend: BackendName = "auto",
    ) -> None:
        check_choice("backend", backend, BackendName)
        self.backend = backend
        self._grad_norm: Tensor | None = None
        self._teachers = Teachers()
        self._names: dict[Tensor, str] = {}
        self._buffers: EmaBuffers | None = None
        self._swap_flag = Flag()
        self._doubt: _Doubt | None = None
        self._begun: _Begun | None = None  # by a step that is not taken yet
        self._make_stepper()
        shared: dict[str, Any] = {
            "ema_decay": ema_decay,
            "ema_order": ema_order,
            "ema_every": ema_every,
            "ema_format": ema_format,
            "kappa": kappa,
            "max_grad_norm": max_grad_norm,
            "master_weights": master_weights,
            "state_format": state_format,
            "rounding_seed": rounding_seed,
        }
        shared |= {"base_steps": 0.0, "ema_skips": 0, "ema_waited": 0.0}
        self._given = _given(ema_decay=ema_decay, ema_order=ema_order, kappa=kappa)
        self._asked: list[dict[str, Any]] = []
        self._placed: list[list[Tensor]] = []
        defaults = as_given({**defaults, **shared})
        self._check_group(defaults)
        if model is not None:
            self._names = named(model)
        self._made = False
        super().__init__(params, defaults)
        if teacher is not None:
            averaged = [self.param_groups[i] for i in self._averaged_groups()]
            self._teachers.bind_whole(teacher, averaged, self._names)
        self._teachers.check_disjoint(self._params())
        del self._made
        self._buffers = resolve(model, ema_buffers, teacher)

    @property
    def kappa(self) -> float:
        """Batch size / base batch size of all param groups; set it to change them all.

        Raises:
            ValueError: read while the groups differ, or set out of ``0 < kappa < inf``, or to a
                value that the groups' scaling rules cannot follow. No group has changed then.
        """
        values = {float(group["kappa"]) for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(f"kappa differs between param groups: {sorted(values)}")
        return values.pop()

    @kappa.setter
    @_disable_dynamo  # a group that compiled code writes to becomes capturable
    def kappa(self, value: float) -> None:
        for group in self.param_groups:
            self._check_group({**group, "kappa": value})
        for fields in (self.defaults, *self.param_groups):
            given = fields["kappa"]
            if isinstance(given, Tensor) and given.is_floating_point() and fields["capturable"]:
                given.fill_(value)  # what a captured graph reads
            else:
                fields["kappa"] = float(value)

    @property
    def ema_every(self) -> int:
        """At which steps the averages of all param groups move; set it to change them all.

        Raises:
            ValueError: the groups differ, or it is out of its range. No group has changed then.
        """
        return int(agreed(self.param_groups, "ema_every"))

    @ema_every.setter
    def ema_every(self, value: int) -> None:
        self._set_all("ema_every", value)

    @property
    def max_grad_norm(self) -> float | None:
        """What the gradients of all param groups together are clipped to; set it for them all.

        Raises:
            ValueError: the groups differ, or it is out of its range. No group has changed then.
        """
        value: float | None = agreed(self.param_groups, "max_grad_norm")
        return value

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._set_all("max_grad_norm", value)

    def _set_all(self, field: str, value: Any) -> None:
        value = number(value)
        self._check_groups([{**group, field: value} for group in self.param_groups])
        for fields in (self.defaults, *self.param_groups):
            fields[field] = value

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradients before clipping, over all parameters.

        A 0-dim float64 tensor beside the first parameter, unscaled if a ``GradScaler`` is in use;
        0 on the CPU if there are no parameters; reading it waits for nothing. None before the first
        step, and without ``max_grad_norm`` (``math.inf`` gives the norm and clips nothing).
        """
        return self._grad_norm

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends in use, one a bucket; empty before the first step."""
        return self._stepper.backends or self._between.backends

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter and move every average, in place.

        Called by ``torch.amp.GradScaler.step`` with ``fused=True``, or by our own scaler, it
        unscales gradients on their way into the rule, and where one is not finite nothing moves
        and nothing is counted. Groups that are not
        capturable are counted on the host: the kernels skip, the next step or :meth:`state_dict`
        takes the count back, and no step waits for its own check (``"foreach"`` and
        ``"reference"`` do).

        ``torch.compile`` breaks its graph here: a step runs as outside, a closure is compiled.
        Write to ``param_groups`` outside: in compiled code torch makes their ``capturable`` True.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, None without one.

        Raises:
            RuntimeError: inside :meth:`ema_weights`, a sparse gradient, or a backend that cannot.
            ValueError: a param group holds a bad value. Nothing has moved in either case.
        """
        self._check_not_swapped("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._check_not_swapped("step()")
        self._take_step()
        return loss

    @_disable_dynamo  # it would compile fragments of it; a closure is left to it
    def _take_step(self) -> None:
        try:
            if torch.is_inference_mode_enabled():
                # what a plan makes there could not be used by a later step outside
                with torch.inference_mode(False), torch.no_grad():
                    self._move()
            else:
                self._move()
        except BaseException:
            self._release()
            raise

    def check_gradients(self) -> Tensor:
        """Whether a gradient is not finite, by one reading pass: a 0-dim float32 tensor, 0 or 1.

        Nothing is moved, and nothing waits for the device.
        """
        return self._measure(None, "check_gradients()").found_inf

    @torch.no_grad()
    def _measure(self, scale: Tensor | None, what: str) -> Measured:
        """Read the gradients ahead of a step that is to divide them by ``scale``, for ``what``."""
        self._check_not_swapped(what)
        try:
            with torch.inference_mode(False):
                stepper = self._prepared()
                max_norm = agreed(self.param_groups, "max_grad_norm")
                treatment = Treatment(scale, max_norm=max_norm, checked=True)
                control = stepper.control(treatment)
                return Measured(treatment, control, control.found_inf, stepper.gradients())
        finally:
            self._release()

    def _prepared(self) -> Stepper:
        """What takes the step at hand, ready to."""
        if self._doubt is not None:  # dynamo's guard around it takes longer than to look
            self._settle()
        averaged = clock.is_due(self.param_groups, agreed(self.param_groups, "ema_every"))
        stepper = self._stepper if averaged else self._between
        stepper.prepare(self.param_groups, self.state, self._check_group, self._complete_state)
        return stepper

    def _move(self) -> None:
        stepper = self._prepared()
        averaged = stepper is self._stepper
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            found_inf = None  # torch's GradScaler sums over the gradients it has seen: none, 0
        max_norm = agreed(self.param_groups, "max_grad_norm")
        treatment = Treatment(getattr(self, "grad_scale", None), found_inf, max_norm)
        measured = self._measured
        if measured is not None and not stepper.takes(measured, treatment):
            measured = None
        if found_inf is not None and not stepper.skips:
            if found_inf.item() != 0.0:
                self._release()
                return
            found_inf = None
            treatment = treatment._replace(found_inf=None)
        moves: Moves = []
        if self._buffers is not None and averaged:
            moves = self._buffers.moves(self._buffer_weights())
        control = None
        if measured is not None:
            control = measured.control
        elif not treatment.changes_nothing:
            control = stepper.control(treatment)
        if max_norm is not None and control is not None:
            self._grad_norm = control.norm
        doubt = None
        if found_inf is not None and stepper.host_counted:
            put_back = clock.counts(self.param_groups)
            doubt = _Doubt(Verdict(found_inf), self._begun, stepper.counted(), put_back)
        calls = stepper.running(control)
        kappas = stepper.folder.kappas
        calls += clock.advance(self.param_groups, kappas, control, stepper.clocked)
        if self.param_groups[0]["ema_every"] > 1:
            calls += clock.wait(self.param_groups, kappas, averaged)
        if moves:
            calls += moving(moves, None if control is None else control.taken)
        if doubt is not None or self._doubt is not None:
            calls.append(partial(setattr, self, "_doubt", doubt))
        if self._begun is not None:
            calls.append(partial(setattr, self, "_begun", None))
        if averaged:
            self._teachers.reshard()  # the full copies, which nothing reads in between
        together(calls)

    @_disable_dynamo
    def _settle(self) -> None:
        """Take the counts of the last step back if a ``GradScaler`` had it skipped.

        The host counts a step before the device has said whether it is taken, and asks when it
        needs the counts again: step() waits for no device but, at most, for the step before.
        """
        doubt = self._doubt
        if doubt is not None and doubt.verdict.skipped():
            uncounting = [partial(slots.uncount) for slots in doubt.counted]
            together([*doubt.put_back, *uncounting, partial(setattr, self, "_doubt", None)])
            self._drop(doubt.begun)
        self._doubt = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch does; ``teacher`` in it: its own, without buffers.

        Without it the group's averages are the optimizer's own; if that was made with a teacher of
        the whole network, they are that teacher's tensors of the same names. A schedule of ``rho``
        goes on where the first group's is.

        Raises:
            ValueError: a bad value, a parameter given twice, or a teacher that does not match, or
                has no tensor known to be a parameter's; the group is not added.
        """
        self._settle()
        teacher, asked = None, dict(self._given)
        if isinstance(param_group, dict):
            asked |= {field: param_group[field] for field in ASKED if field in param_group}
            param_group = as_given(param_group)  # a copy: the caller's may be used again
            teacher = param_group.pop("teacher", None)
            if self.param_groups:
                param_group.setdefault("base_steps", float(self.param_groups[0]["base_steps"]))
            checked = {"params": [], **self.defaults, **param_group}
            self._check_group(checked)
            agreed([*self.param_groups, checked], "ema_every")
            agreed([*self.param_groups, checked], "max_grad_norm")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if len(set(group["params"])) != len(group["params"]):
                raise ValueError("params: a parameter appears twice in a param group")
            for param in group["params"]:
                if param.requires_grad and not is_lazy(param):
                    check_param(param, self.rule is not FROZEN)
            self._learn_names(group)
            if teacher is not None:
                check_buffers_given(teacher)
                # a constructor's groups are looked at together: one by one would be quadratic
                among = self._params() if self._made else None
                self._teachers.bind(teacher, [group], self._names, among)
            elif self._made:
                self._teachers.bind_added(group, self._names, self._params())
        except Exception:
            self.param_groups.pop()
            raise
        self._asked.append(asked)
        self._placed.append(list(group["params"]))
        self._forget_plans()

    @torch.no_grad()
    def reset_moments(self, params: Iterable[Tensor] | None = None) -> None:
        """Let the rule start anew: momentum and moments become zero, in place, and their counts.

        Bias corrections and SGD's first step are then those of a new optimizer. Weights, masters,
        averages and ``base_steps``, where schedules of ``rho`` are, go on. (``del opt.state[p]``
        would restart the averages too.)

        Args:
            params: some of the optimizer's parameters; None: all.

        Raises:
            ValueError: a parameter is not the optimizer's; nothing has changed then.
            RuntimeError: inside :meth:`ema_weights`, or the rule's states are not here (FusedEMA).
        """
        self._check_not_swapped("reset_moments()")
        if self.rule is FROZEN:
            raise RuntimeError(
                "reset_moments() of a FusedEMA; allowed: resetting the state of the optimizer that "
                "it follows, which holds the moments"
            )
        self._settle()
        own = {param: group for group in self.param_groups for param in group["params"]}
        chosen = list(own if params is None else [params] if isinstance(params, Tensor) else params)
        for i, param in enumerate(chosen):
            if param not in own:
                raise ValueError(f"params: entry {i} is not a parameter of this optimizer")
        for param in chosen:
            reset(self.rule, own[param], self.state.get(param, {}))

    def state_dict(self) -> StateDict:
        """The state as torch lays it out, the averages under ``ema``, ``ema_1``, ...

        A schedule is configuration: ``"schedule"`` stands in its place, and its position,
        ``base_steps``, is saved. Averaged buffers are in the state of the first parameter that has
        an average, under ``"ema_buffers"``: a dict by average, ``"0"``, ``"1"``, ..., and name.

        Raises:
            RuntimeError: inside :meth:`ema_weights`.
        """
        self._check_not_swapped("state_dict()")
        self._settle()
        self._follow_replaced()

        def write(_: Optimizer, state_dict: StateDict) -> StateDict:
            return checkpoint.to_save(
                state_dict, self.param_groups, self._buffers, self._entry_to_save
            )

        # first, so that hooks of the user's see what is saved
        hook = self.register_state_dict_post_hook(write, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _entry_to_save(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What a state dict holds of one parameter's state."""
        return entry

    @_disable_dynamo
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this class or of its torch namesake, in copies.

        Hyper-parameters load as torch's do; a ``kappa``, ``ema_decay`` or ``ema_order`` that
        differs from one that the constructor was given is warned of. What chooses storage or an
        implementation stays as it is here: ``foreach``, ``fused``, ``capturable``,
        ``differentiable``, ``backend``, ``master_weights``, ``ema_format``, ``state_format``. The
        state is converted: moments and averages at once, differences and masters that the state
        lacks at the next step, from the weights as they are then. So do averages begin that it
        lacks (torch's has none); beside a teacher that is warned of. A teacher's tensors take the
        saved values in place. Where both sides have ``param_names``, these say which state is
        whose.

        Raises:
            ValueError: groups, names or shapes do not match, or a bad value. Nothing has changed
                then.
            RuntimeError: inside :meth:`ema_weights`.
        """
        self._check_not_swapped("load_state_dict()")
        self._settle()
        self._follow_replaced()
        given = state_dict.copy()
        for read in list(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = read(self, given)
            given = given if changed is None else changed
        new = checkpoint.load(
            self.rule,
            self.param_groups,
            self._asked,
            given,
            self._check_groups,
            self._buffers,
            self._teachers.tensors,
        )
        state: defaultdict[Any, Any] = defaultdict(dict, new.state)
        try:
            self.__setstate__({"state": state, "param_groups": new.groups})
            new.write()
        except BaseException:
            if self.state is state:  # an interrupt: what has begun is ended
                new.write()
            raise
        self._teachers.reshard()
        for seen in list(self._optimizer_load_state_dict_post_hooks.values()):
            seen(self)

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_swapped("copying or pickling the optimizer")
        self._settle()
        options = ("backend", "_given", "_asked", "_placed")
        own = (*options, "_teachers", "_names", "_buffers")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers: EmaBuffers | None = getattr(self, "_buffers", None)
        if buffers is not None and "_buffers" not in state:
            # taken in with the rest in one assignment, which an interrupt cannot divide
            entries = (entry for entry in state["state"].values() if isinstance(entry, dict))
            held: Any = next((entry[BUFFERS] for entry in entries if BUFFERS in entry), {})
            state = {**state, "_buffers": buffers.holding(held)}
        super().__setstate__(state)
        self._grad_norm = None
        self._doubt = None
        self._begun = None
        if hasattr(self, "_stepper"):  # loading a state dict: graphs may still use old plans
            self._forget_plans()
        else:
            self._swap_flag = Flag()
            self._make_stepper()

    def _make_stepper(self) -> None:
        self._stepper, self._between = (
            Stepper(self.rule, self.backend, averaged) for averaged in (True, False)
        )

    def _release(self) -> None:
        """Let go of the gradients of a step that is not taken, and of what it has let begin."""
        self._stepper.release()
        self._between.release()
        begun, self._begun = self._begun, None
        self._drop(begun)

    def _drop(self, begun: _Begun | None) -> None:
        if begun is None:
            return
        for param, keys in begun.keys:
            state = self.state.get(param, {})
            for key in keys & state.keys():
                del state[key]
            if not state:
                self.state.pop(param, None)
        if self._buffers is not None:
            self._buffers.held = begun.held
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._stepper.forget()
        self._between.forget()

    def _complete_state(self) -> None:
        # an average made under the user's inference_mode could never be stepped
        self._follow_replaced()
        if self._begun is None:
            held = [] if self._buffers is None else list(map(dict, self._buffers.held))
            self._begun = _Begun([], held)
        before = [(param, set(self.state.get(param, ()))) for param in self._params()]
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._complete_all()
        finally:
            new = ((param, self.state.get(param, {}).keys() - keys) for param, keys in before)
            self._begun.keys.extend((param, keys) for param, keys in new if keys)

    def _complete_all(self) -> None:
        for group in self.param_groups:
            clock.complete(group)
            for param in group["params"]:
                if not is_there(param) or is_fixed(param):
                    continue
                complete(
                    self.rule, group, param, self.state[param], self._teachers.tensors.get(param)
                )
        if self._buffers is not None:
            self._begin_buffers(self._buffers)

    def _follow_replaced(self) -> None:
        """Hand on what is held of parameters that others have been put in the place of."""
        if self._buffers is not None:
            self._names.update(named(self._buffers.model))
        for group in self.param_groups:
            self._names.update(zip(group["params"], group.get("param_names", ()), strict=False))
        replaced.follow(
            self._placed, self.param_groups, self._names, self.state, self._teachers.tensors
        )
        self._placed = [list(group["params"]) for group in self.param_groups]

    def _begin_buffers(self, buffers: EmaBuffers) -> None:
        """Hold averaged buffers, and let the state show them where checkpoints look."""
        buffers.begin(self._num_emas())
        entry, home = buffers.entry(), checkpoint.home(self.param_groups)
        for param in self._params():
            self.state.get(param, {}).pop(BUFFERS, None)
        if entry and home is not None:
            self.state[home][BUFFERS] = entry

    def _buffer_weights(self) -> tuple[float, ...]:
        """The weights of the group with the most averages: buffers belong to no group."""
        weights = [self._stepper.folder.weights(i) for i in range(len(self.param_groups))]
        return max(weights, key=len)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _learn_names(self, group: dict[str, Any]) -> None:
        """Of a new group: the student module's if it is known, which may have grown, or given."""
        params = group["params"]
        if self._buffers is not None and not all(param in self._names for param in params):
            self._names.update(named(self._buffers.model))
        for param, name in zip(params, group.get("param_names", ()), strict=False):
            self._names.setdefault(param, name)

    def _check_group(self, group: Mapping[str, Any]) -> Checked:
        return check_group(self.rule, group, self.backend)

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for param groups that hold a bad value, or do not go together."""
        for group in groups:
            self._check_group(group)
        check_groups(groups)


def _given(**fields: Any) -> dict[str, Any]:
    """The arguments that a user has given, as far as their defaults tell."""
    absent = {"ema_decay": None, "ema_order": "after", "kappa": KAPPA}
    return {field: value for field, value in fields.items() if value is not absent[field]}
