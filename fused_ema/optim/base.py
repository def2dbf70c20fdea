"""The base class of the optimizers: torch's interface around plans that step whole buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from ..checks import check_choice
from ..ema.buffers import BUFFERS, EmaBuffers, EmaBuffersMode, resolve
from ..ema.decay import EmaDecay, EmaOrder
from ..ema.formats import EmaFormat, StateFormat
from ..ema.swap import Flag
from ..ema.teacher import Teacher, check_buffers_given, named
from ..ema.teachers import Teachers
from ..rules.frozen import FROZEN
from ..rules.rule import Rule
from ..scaling import KappaScales
from ..step.backends import BackendName
from ..step.state import check_param, reset
from ..step.stepper import Stepper
from ..values import as_given, number
from ..wrapped import forward
from . import attaching, checkpoint
from .checkpoint import ASKED
from .groups import KAPPA, agreed, check_groups, scaled_hyperparameters
from .options import documented
from .stepping import Doubt, Stepping


@documented
class FusedScaledOptimizer(Stepping):
    """Base class of the optimizers: one fused pass a bucket for the step and every average.

    Under a ``torch.amp.GradScaler``, ``fused=True`` unscales gradients in the step's own pass.
    Without it the scaler unscales ``.grad`` before the step, as with torch's default, so that
    trainers can clip in between, and it does not call :meth:`step` if a gradient is not finite.
    :class:`~fused_ema.optim.grad_scaler.GradScaler` uses the one pass in either case.

    Subclasses set :attr:`rule` and pass the defaults of torch's namesake.

    Args:
        {params}
        defaults: the rule's hyper-parameters at the base batch size.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    rule: ClassVar[Rule]

    _made = True  # False while the constructor adds its param groups

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "optimizer"):  # a wrapper that has taken the optimizer's class
            forward(cls, next(c for c in cls.__bases__ if issubclass(c, FusedScaledOptimizer)))

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
        kappa_scales: KappaScales = "all",
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
        self._doubt: Doubt | None = None
        self._stepper = Stepper(self.rule, backend)
        shared: dict[str, Any] = {
            "ema_decay": ema_decay,
            "ema_order": ema_order,
            "ema_every": ema_every,
            "ema_format": ema_format,
            "kappa": kappa,
            "kappa_scales": kappa_scales,
            "max_grad_norm": max_grad_norm,
            "master_weights": master_weights,
            "state_format": state_format,
            "rounding_seed": rounding_seed,
        }
        shared |= {"base_steps": 0.0, "ema_skips": 0, "ema_waited": 0.0}
        self._given = _given(
            ema_decay=ema_decay, ema_order=ema_order, kappa=kappa, kappa_scales=kappa_scales
        )
        self._asked: list[dict[str, Any]] = []
        self._known_params: list[list[Tensor]] = []
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
            ValueError: on reading, the groups differ; on setting, the value is outside
                ``0 < kappa < inf``, or the groups' scaling rules cannot follow it. No group changes
                then.
        """
        values = {float(group["kappa"]) for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(f"kappa differs between param groups: {sorted(values)}")
        return values.pop()

    @kappa.setter
    @_disable_dynamo  # torch makes a group capturable if compiled code writes to it
    def kappa(self, value: float) -> None:
        for group in self.param_groups:
            self._check_group({**group, "kappa": value})
        for fields in (self.defaults, *self.param_groups):
            given = fields["kappa"]
            if isinstance(given, Tensor) and given.is_floating_point() and fields["capturable"]:
                given.fill_(value)  # in place: a captured graph reads this tensor
            else:
                fields["kappa"] = float(value)

    @property
    def ema_every(self) -> int:
        """The averages of all param groups move at every so many steps; set it to change them all.

        Raises:
            ValueError: the groups differ, or it is out of its range. No group has changed then.
        """
        return int(agreed(self.param_groups, "ema_every"))

    @ema_every.setter
    def ema_every(self, value: int) -> None:
        self._set_all("ema_every", value)

    @property
    def max_grad_norm(self) -> float | None:
        """Norm to which the gradients of all param groups together are clipped; can be set.

        Raises:
            ValueError: the groups differ, or it is out of its range. No group has changed then.
        """
        value: float | None = agreed(self.param_groups, "max_grad_norm")
        return value

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._set_all("max_grad_norm", value)

    def scaled_hyperparameters(self) -> list[dict[str, Any]]:
        """What the next step uses: one dict for each param group, its values after ``kappa``.

        The names are torch's: ``lr``, and as the optimizer has them ``betas``, ``momentum``,
        ``dampening``, ``alpha``, ``eps``, ``weight_decay``. With these values torch's namesake
        makes the same steps, as long as they do not change. So with ``momentum_scaling="exact"``
        ``lr`` also holds the factor by which this library's momentum buffer is larger.

        ``ema_decay`` is ``rho**kappa`` (with ``ema_every`` that of the averages' next move): a
        float, a tuple if the group has one, or None without an average. A schedule is read where
        it is now. :class:`~fused_ema.FusedEMA` has ``ema_decay`` alone. Values are floats; reading
        tensors waits for their device.

        Raises:
            ValueError: a param group or a schedule holds a bad value.
        """
        self._follow_groups()
        self._settle()
        for group in self.param_groups:
            self._check_group(group)
        return [scaled_hyperparameters(self.rule, as_given(group)) for group in self.param_groups]

    def _set_all(self, field: str, value: Any) -> None:
        value = number(value)
        self._check_groups([{**group, field: value} for group in self.param_groups])
        for fields in (self.defaults, *self.param_groups):
            fields[field] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch does; it may hold a ``teacher`` of its own, without buffers.

        Without one, the optimizer holds the group's averages; if it was made with a teacher of the
        whole network, they are that teacher's tensors of the same names. A schedule of ``rho``
        continues at the first group's position.

        Raises:
            ValueError: a value is bad, a parameter is given twice, or a teacher does not match or
                has no tensor that is known to belong to a parameter. The group is not added then.
        """
        self._settle()
        teacher, asked = None, dict(self._given)
        if isinstance(param_group, dict):
            asked |= {field: param_group[field] for field in ASKED if field in param_group}
            param_group = as_given(param_group)  # a copy: the caller may reuse the group
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
                # the constructor checks its groups together, because one by one would be quadratic
                among = self._params() if self._made else None
                self._teachers.bind(teacher, [group], self._names, among)
            elif self._made:
                self._teachers.bind_added(group, self._names, self._params())
        except Exception:
            self.param_groups.pop()
            raise
        self._asked.append(asked)
        self._known_params.append(list(group["params"]))
        self._stepper.forget()

    def attach_model(
        self,
        model: nn.Module,
        *,
        teacher: Teacher | None = None,
        ema_buffers: EmaBuffersMode | None = None,
    ) -> None:
        """Take ``model=``, ``teacher=`` and ``ema_buffers=`` after construction, once.

        For optimizers that a framework's factory makes from parameters alone. Names and buffers are
        known from now on, also those of a state that was loaded before. A teacher takes the value
        of an average that exists already, in place; otherwise the average starts at the teacher.

        Args:
            model: the student module, which holds the optimizer's parameters.
            teacher: as in the constructor.
            ema_buffers: as in the constructor.

        Raises:
            ValueError: ``model`` holds none of the parameters, the teacher does not match, or
                ``ema_buffers`` is not known. Nothing changes then.
            RuntimeError: the optimizer knows its model or a teacher already, or inside
                :meth:`ema_weights`.
        """
        self._check_not_swapped("attach_model()")
        self._settle()
        attaching.attach(self, model, teacher, ema_buffers)
        self._stepper.forget()

    @torch.no_grad()
    def reset_moments(self, params: Iterable[Tensor] | None = None) -> None:
        """Restart the rule: momentum, moments and their counts become zero, in place.

        Bias correction and SGD's first step are then those of a new optimizer. Weights, masters,
        averages and ``base_steps``, the position of schedules, stay. (``del opt.state[p]`` would
        restart the averages too.)

        Args:
            params: some of the optimizer's parameters; None takes all.

        Raises:
            ValueError: a parameter is not the optimizer's. Nothing changes then.
            RuntimeError: inside :meth:`ema_weights`, or the optimizer has no rule of its own
                (FusedEMA).
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
        """Return the state in torch's layout, with the averages under ``ema``, ``ema_1``, ...

        A schedule is configuration and is not saved: the string ``"schedule"`` replaces it, and its
        position, ``base_steps``, is saved. The state of the first parameter that has an average
        holds the averaged buffers under ``"ema_buffers"``: a dict by average, ``"0"``, ``"1"``,
        ..., and name.

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

        # first, so that the user's hooks see what is saved
        hook = self.register_state_dict_post_hook(write, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _entry_to_save(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The part of one parameter's state that a state dict holds."""
        return entry

    @_disable_dynamo
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a copy of a state of this class or of its torch namesake.

        Hyper-parameters load as in torch. A warning tells if a ``kappa``, ``kappa_scales``,
        ``ema_decay`` or ``ema_order`` differs from the constructor's argument. Options that choose
        storage or an implementation stay as they are here: ``foreach``, ``fused``, ``capturable``,
        ``differentiable``, ``backend``, ``master_weights``, ``ema_format``, ``state_format``. The
        state is converted to them: moments and averages at once, missing masters and averages
        stored as differences at the next step, from the weights as they are then. Other missing
        averages (torch's states have none) start at the next step too; if there is a teacher, a
        warning tells. A teacher's tensors take the saved values in place. If both sides have
        ``param_names``, states are matched by name.

        Raises:
            ValueError: groups, names or shapes do not match, or a value is bad. Nothing changes
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
            if self.state is state:  # interrupted after the assignment: finish the load
                new.write()
            raise
        self._teachers.reshard()
        for seen in list(self._optimizer_load_state_dict_post_hooks.values()):
            seen(self)

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_swapped("copying or pickling the optimizer")
        self._settle()
        options = ("backend", "_given", "_asked", "_known_params")
        own = (*options, "_teachers", "_names", "_buffers")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers: EmaBuffers | None = getattr(self, "_buffers", None)
        if buffers is not None and "_buffers" not in state:
            # one assignment installs them with the rest, and an interrupt cannot divide it
            entries = (entry for entry in state["state"].values() if isinstance(entry, dict))
            held: Any = next((entry[BUFFERS] for entry in entries if BUFFERS in entry), {})
            state = {**state, "_buffers": buffers.holding(held)}
        super().__setstate__(state)
        self._grad_norm = None
        self._doubt = None
        if hasattr(self, "_stepper"):  # loading: captured graphs may still use the old plans
            self._stepper.forget()
        else:
            self._swap_flag = Flag()
            self._stepper = Stepper(self.rule, self.backend)

    def _learn_names(self, group: dict[str, Any]) -> None:
        """Learn the names of a new group: from the student module if it is known, or as given."""
        params = group["params"]
        if self._buffers is not None and not all(param in self._names for param in params):
            self._names.update(named(self._buffers.model))
        for param, name in zip(params, group.get("param_names", ()), strict=False):
            self._names.setdefault(param, name)

    def _check_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for param groups that hold a bad value, or do not go together."""
        for group in groups:
            self._check_group(group)
        check_groups(groups)


def _given(**fields: Any) -> dict[str, Any]:
    """The arguments that the user has given, told apart by their defaults."""
    absent = {"ema_decay": None, "ema_order": "after", "kappa": KAPPA, "kappa_scales": "all"}
    return {field: value for field, value in fields.items() if value is not absent[field]}
