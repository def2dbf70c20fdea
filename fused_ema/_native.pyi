from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .backends.plan import Fold

class Slots:
    """A bucket's tensors as the words that a device kernel reads.

    ``[scalars: rows x W float64 | row of each slot | gradients | slots]``. A row is the rule's
    scalars and a weight per average; where averages or states are rounded stochastically, the
    step's seed comes last. A slot is its number of elements, its place among the optimizer's
    parameters, then addresses: parameter, states, averages. The first of the states is the master
    where there is one, the last of the averages a bfloat16 copy of the first where there is a
    teacher beside differences.
    """

    def __init__(
        self,
        num_scalars: int,
        frozen: bool,
        takes_grads: bool,
        capturable: bool,
        master: bool,
        teacher: bool,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        emas: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        places: Sequence[int],
    ) -> None: ...
    def prepare(self, fold: Fold) -> bool: ...
    def advance(self) -> None:
        """Count the prepared step, tell autograd of the writes, drop copies of gradients."""
    def uncount(self) -> None:
        """Take the count of the last step back; counters written by others stay."""
    @property
    def num_words(self) -> int: ...
    @property
    def num_changed(self) -> int:
        """Leading words that differ from those last packed."""
    @property
    def num_rows(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def active(self) -> list[bool]:
        """Which slots have a gradient."""
    def pack(self, words: Tensor) -> None:
        """Fill an int64 tensor of the CPU with the leading words."""
    def chunks(self, elements: int) -> Tensor:
        """``(slot, index)`` of each run of ``elements`` elements: int32 ``[n, 2]``."""

class Plan:
    """A bucket of dense CPU tensors, stepped by the C++ kernels."""

    captured: bool
    skipping: None
    def __init__(self, rule: str, slots: Slots, ema_before: bool) -> None: ...
    @property
    def target(self) -> str:
        """The CPU loop in use: "baseline", "avx2" or "avx512"."""
    def prepare(self, fold: Fold) -> bool: ...
    def sum_of_squares(self) -> Tensor: ...
    def run(self, control: Tensor | None = None) -> None: ...

class CudaPlan:
    """A bucket of dense tensors on a GPU, stepped by one launch; absent without CUDA."""

    def __init__(self, rule: str, slots: Slots, ema_before: bool) -> None: ...
    @property
    def captured(self) -> bool:
        """Whether a CUDA graph uses memory that the plan owns."""
    @property
    def skipping(self) -> Slots: ...
    def prepare(self, fold: Fold) -> bool: ...
    def sum_of_squares(self) -> Tensor: ...
    def run(self, control: Tensor | None = None, scalars: Tensor | None = None) -> None: ...

HAS_CUDA: bool
"""Whether the CUDA kernels were built; what follows is there only if they were."""

CUDA_VERSION: int
"""Of the compiler, as in 13000 for 13.0."""

CUDA_ARCHITECTURES: list[int]
"""What the kernels were compiled for, as in 800."""

class Watch:
    """Remembers which objects an optimizer's param groups and state hold."""

    def __init__(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
    ) -> None: ...
    def unchanged(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        """Whether the same objects are there, in the same places."""

class Swap:
    """A context manager that puts values into tensors and gives everything back.

    ``flag.swapped`` is True meanwhile; where it is already, ``flag.check(what)`` raises.
    ``begin()`` says what to hold: ``tensors``, of ``(owner, part, value, copied, name)``, and
    ``places``, of ``(dict, key, value, fixed)``. ``end()`` is called after everything has been
    restored, and again where it raised. Dropped while open, it restores, too.
    """

    def __init__(self, flag: Any, begin: Callable[[], Any], end: Callable[[], Any]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is plain memory: no subclass, lazy negation, conjugation, inference."""

def cpu_targets() -> list[str]:
    """CPU loops that this build has and this processor can run, the preferred one first."""

def rule_scalars() -> dict[str, list[str]]:
    """Names of the scalars that each C++ rule reads, in table order."""
