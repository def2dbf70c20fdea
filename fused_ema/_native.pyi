from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .step.backends.plan import Fold
from .step.gradients import Ending

class Slots:
    """A bucket's tensors as the words that a device kernel reads, see :mod:`fused_ema.step.layout`.

    The first of the states is the master where there is one.
    """

    def __init__(
        self,
        num_scalars: int,
        frozen: bool,
        takes_grads: bool,
        capturable: bool,
        master: bool,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        emas: Sequence[Sequence[Tensor]],
        groups: Sequence[int],
        param_indices: Sequence[int],
    ) -> None: ...
    def prepare(self, fold: Fold) -> bool: ...
    def begin(self) -> None:
        """Read all addresses anew, right before kernels use them."""
    def begin_gradients(self) -> None:
        """Read the gradients' addresses anew."""
    def hold(self) -> Hold:
        """Keep all memory of the step where it is: a context. Nothing is prepared inside."""
    def advance(self) -> None:
        """Count the prepared step, tell autograd of the writes, let go of the gradients."""
    def release(self) -> None:
        """Let go of the gradients of a step that is not taken."""
    def uncount(self) -> None:
        """Take the count of the last step back; counters written by others stay."""
    @property
    def num_words(self) -> int: ...
    @property
    def num_changed(self) -> int:
        """Leading words that differ from those last packed."""
    @property
    def word_layout(self) -> tuple[int, int, int]:
        """A :class:`~fused_ema.step.layout.WordLayout` of what was prepared."""
    @property
    def slot_layout(self) -> tuple[int, int, int, int, int, int, int]:
        """A :class:`~fused_ema.step.layout.SlotLayout`."""
    @property
    def num_rows(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def counters(self) -> list[int]:
        """The address of each slot's count, plus one where it has a gradient."""
    def pack(self, words: Tensor) -> None:
        """Fill an int64 tensor of the CPU with the leading words."""
    def chunks(self, elements: int) -> Tensor:
        """``(slot, index)`` of each run of ``elements`` elements: int32 ``[n, 2]``."""

class Hold:
    """Storages that nobody can free or resize, until it is left."""

    def __enter__(self) -> Hold: ...
    def __exit__(self, *args: object) -> None: ...

class Plan:
    """A bucket of dense CPU tensors, stepped by the C++ kernels."""

    captured: bool
    skipping: None
    num_sums: int
    def __init__(self, rule: str, variant: str, slots: Slots, ema_before: bool) -> None: ...
    @property
    def target(self) -> str:
        """The CPU loop in use: "baseline", "avx2" or "avx512"."""
    def prepare(self, fold: Fold) -> bool: ...
    def release(self) -> None: ...
    def norm(self, partial_sums: Tensor | None, ending: Ending | None) -> None: ...
    def run(self, control: Tensor | None = None) -> None: ...

TORCH_VERSION: str
"""The torch version that this was built for, as in "2.14.1"."""

class Gradients:
    """Remembers which gradients parameters have."""

    def __init__(self, params: list[Tensor]) -> None: ...
    def unchanged(self, params: list[Tensor]) -> bool:
        """Whether they have the same ones, unwritten since, as far as autograd knows."""

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
    ``entries``, of ``(dict, key, value, fixed)``. ``end()`` is called after everything has been
    restored, and again where it raised. Dropped while open, it restores, too.
    """

    def __init__(self, flag: Any, begin: Callable[[], Any], end: Callable[[], Any]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

class Addresses:
    """Remembers where tensors lie."""

    def __init__(self, tensors: list[Tensor]) -> None: ...
    def unchanged(self, tensors: list[Tensor]) -> bool:
        """Whether each begins at the same address."""

def spans(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """First address of each tensor's memory and the one behind its last.

    0 and 0 where it has none that another one may share: no elements, no storage, or one that is
    copied when it is written to.
    """

def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is plain memory: no subclass, nothing lazy, no inference."""

def cpu_targets() -> list[str]:
    """CPU loops that this build has and this processor can run, the preferred one first."""

def rule_scalars() -> dict[str, list[str]]:
    """Names of the scalars that each C++ rule reads, in table order."""

def rule_variants() -> dict[str, dict[str, int]]:
    """How many states each variant of a C++ rule keeps."""

def rule_numbers() -> dict[str, list[str]]:
    """Names of the numbers that each C++ rule folds them from, as ``Rule.number_names``."""

def rule_flags() -> dict[str, list[str]]:
    """What the bits of its flags stand for, as ``Rule.flag_names``."""
