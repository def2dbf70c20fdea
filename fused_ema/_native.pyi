from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .backends.plan import Fold

class Plan:
    """A bucket of dense CPU tensors, stepped by the C++ kernels."""

    def __init__(
        self,
        rule: str,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        emas: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        ema_before: bool,
    ) -> None: ...
    @property
    def target(self) -> str:
        """The CPU loop in use: "baseline", "avx2" or "avx512"."""
    def prepare(self, fold: Fold) -> bool: ...
    def run(self) -> None: ...

class Watch:
    """Remembers which objects an optimizer's param groups and state hold."""

    def __init__(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
    ) -> None: ...
    def unchanged(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        """Whether the same objects are there, in the same places."""

def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is plain memory: no subclass, lazy negation, conjugation, inference."""

def cpu_targets() -> list[str]:
    """CPU loops that this build has and this processor can run, the preferred one first."""

def rule_scalars() -> dict[str, list[str]]:
    """Names of the scalars that each C++ rule reads, in table order."""
