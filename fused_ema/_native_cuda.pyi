from torch import Tensor

# The same interface, but a type of its own: plans take this module's slots.
from ._native import Hold as Hold
from ._native import Slots as Slots
from .step.backends.plan import Fold
from .step.gradients import Ending

class CudaPlan:
    """A bucket of dense tensors on a GPU, stepped by one launch."""

    def __init__(self, rule: str, variant: str, slots: Slots, ema_before: bool) -> None: ...
    @property
    def captured(self) -> bool:
        """Whether a CUDA graph uses memory that the plan owns."""
    @property
    def skipping(self) -> Slots: ...
    def prepare(self, fold: Fold) -> bool: ...
    def release(self) -> None: ...
    @property
    def num_sums(self) -> int: ...
    def norm(self, partial_sums: Tensor | None, ending: Ending | None) -> None: ...
    def run(self, control: Tensor | None = None, groups: bytes | None = None) -> None:
        """Step; of a capturable bucket ``groups`` are its ``GroupRecords``."""

TORCH_VERSION: str
"""The torch version that this was built for, as in "2.14.1"."""

CUDA_VERSION: int
"""The CUDA compiler's version, as in 13000 for 13.0."""

CUDA_ARCHITECTURES: list[int]
"""What the kernels were compiled for, as in 800."""

CUDA_PTX: list[int]
"""Those of them for which there is PTX too, which later GPUs can compile."""
