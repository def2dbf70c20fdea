"""The teachers of an optimizer: for each parameter, the tensor that is its average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..dtypes import is_fixed
from ..names import renamed
from ..sharding import is_sharded, reshard
from .decay import decays
from .teacher import (
    Teacher,
    by_name,
    check_disjoint,
    check_whole,
    fitting,
    lasting,
    pair,
    resharding_modules,
)

Group = Mapping[str, Any]


class Teachers:
    """The teacher's tensor of every parameter that has one, which is its first average.

    Attributes:
        tensors: the teacher's tensor by parameter.
    """

    def __init__(self) -> None:
        self.tensors: dict[Tensor, Tensor] = {}
        self._whole: nn.Module | dict[str, Tensor] | None = None
        self._modules: list[Any] = []

    def bind_whole(
        self, teacher: Teacher, groups: Sequence[Group], names: Mapping[Tensor, str]
    ) -> None:
        """Pair the parameters of all groups; groups that are added later are paired by name.

        Raises:
            ValueError: see :meth:`bind`.
        """
        teacher = lasting(teacher)
        self.bind(teacher, groups, names)
        self._whole = by_name(teacher)

    def bind(
        self,
        teacher: Teacher,
        groups: Sequence[Group],
        names: Mapping[Tensor, str],
        among: Iterable[Tensor] | None = None,
    ) -> None:
        """Pair the parameters of ``groups`` that have no teacher yet with its tensors.

        Args:
            teacher: a module, its parameters, or its named parameters.
            groups: param groups.
            names: names of the optimizer's parameters, as far as known.
            among: all parameters, with which the tensors must not share memory; None leaves that
                check to a later :meth:`check_disjoint` of all teachers at once.

        Raises:
            ValueError: the teacher does not fit, or shares memory. Nothing is paired then.
        """
        params = [p for group in groups for p in group["params"] if p not in self.tensors]
        if not params or not all(decays(group["ema_decay"]) for group in groups):
            raise ValueError("teacher was given, but ema_decay=None; allowed: a decay for it")
        modules = resharding_modules(teacher)
        reshard(modules)
        pairs = pair(teacher, params, names, len(groups) == 1, fitting(groups))
        check_whole(teacher, pairs.values())
        if among is not None:
            _check_disjoint({**self.tensors, **pairs}, among)
        self.tensors.update(pairs)
        self._modules += [module for module in modules if module not in self._modules]

    def bind_added(
        self, group: Group, names: Mapping[Tensor, str], among: Iterable[Tensor]
    ) -> None:
        """Pair an added group with its part of the teacher that the optimizer was made with.

        Without such a teacher nothing happens. Arguments and errors are those of :meth:`bind`.
        """
        if self._whole is None or not decays(group["ema_decay"]):
            return
        if not self._whole or not all(param in names for param in group["params"]):
            raise ValueError(
                "add_param_group(): the optimizer was made with a teacher, and its tensors for the "
                "new parameters are not known; pass them as the group's 'teacher', or give the "
                "group ema_decay=None (a teacher module, and model=<the student module> or named "
                "parameters, pair by name)"
            )
        whole = self._whole if isinstance(self._whole, nn.Module) else self._whole.items()
        self.bind(whole, [group], names, among)

    def renew(self, names: Mapping[Tensor, str], state: Mapping[Any, Any]) -> None:
        """Take the present parameters of a teacher module, which FSDP2 may have replaced.

        Args:
            names: names of the optimizer's parameters.
            state: the optimizer's state; a teacher that holds an average already stays.
        """
        if not isinstance(self._whole, nn.Module):
            return
        present = renamed(dict(self._whole.named_parameters()), names.values())
        for param, old in self.tensors.items():
            new = present.get(names.get(param, ""), old)
            # whole again for a while, as after a forward pass, it is not the module's own
            if "ema" not in state.get(param, ()) and (is_sharded(new) or not is_sharded(old)):
                self.tensors[param] = new
        self._modules = [*dict.fromkeys([*self._modules, *resharding_modules(self._whole)])]

    def check_disjoint(self, params: Iterable[Tensor]) -> None:
        """Raise ValueError if a teacher's tensor shares memory with another or a parameter."""
        _check_disjoint(self.tensors, params)

    def reshard(self) -> None:
        """Drop full copies of sharded tensors, which FSDP2's modules would otherwise reuse."""
        reshard(self._modules)


def _check_disjoint(pairs: Mapping[Tensor, Tensor], params: Iterable[Tensor]) -> None:
    teachers = [tensor for param, tensor in pairs.items() if not is_fixed(param)]
    if teachers:
        check_disjoint(teachers, params)
