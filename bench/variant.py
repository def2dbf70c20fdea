"""A compiled variant of the step kernel (``variant.cu``), and tensors for it to step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case

SCALARS = {
    "grad_factor": 1.0,
    "weight_decay": 0.0,
    "decay": 1e-4,
    "weight1": 0.1,
    "weight2": 0.01,
    "step_size": 1e-3,
    "eps": 1e-6,
}
EMA_WEIGHT = 1e-3
ARRAYS = ("param", "grad", "exp_avg", "exp_avg_sq", "ema")
# In float32; all arrays are read, and all but the gradients are written.
BYTES_PER_PARAM = torch.float32.itemsize * (2 * len(ARRAYS) - 1)
# Floats in the widest access, to which every tensor is aligned, as with torch's allocators.
ALIGNMENT = 4


class Variant:
    """A variant, loaded from a library of :mod:`bench.variants`."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.variant_elements.restype = ctypes.c_int64
        library.variant_grads_at.restype = ctypes.c_int64
        library.variant_grads_at.argtypes = [ctypes.c_int]
        library.variant_scalar.restype = ctypes.c_char_p
        library.variant_scalar.argtypes = [ctypes.c_size_t]
        library.variant_fits.restype = ctypes.c_bool
        library.variant_fits.argtypes = [ctypes.c_int64]
        library.variant_step.restype = ctypes.c_char_p
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.variant_step.argtypes = [
            *(pointer, count, pointer, ctypes.c_int),  # chunks, slots
            *(pointer, pointer, count),  # words
            *(pointer, ctypes.c_int, pointer),  # control, device, stream
        ]
        self.name = path.stem
        self.elements: int = library.variant_elements()
        self.scalars = [SCALARS[name] for name in scalar_names(library)]
        self._library = library

    def grads_at(self, num_slots: int) -> int:
        """The number of words before those of the gradients."""
        return int(self._library.variant_grads_at(num_slots))

    def fits(self, words: Tensor) -> bool:
        """Whether the words fit into the kernel's parameters."""
        return bool(self._library.variant_fits(words.numel()))

    def step(self, bucket: Bucket) -> None:
        """Launch the kernel on the current stream.

        Raises:
            RuntimeError: CUDA refuses.
        """
        chunks = bucket.chunks(self.elements)
        words, on_device = bucket.words(self.scalars, self.grads_at(len(bucket.slots)))
        refused = self._library.variant_step(
            *(chunks.data_ptr(), len(chunks), bucket.slots.data_ptr(), len(bucket.slots)),
            *(words.data_ptr(), None if self.fits(words) else on_device.data_ptr(), words.numel()),
            *(bucket.control.data_ptr(), bucket.index, bucket.stream),
        )
        if refused is not None:
            raise RuntimeError(f"{self.name}: {refused.decode()}")


def scalar_names(library: ctypes.CDLL) -> Iterator[str]:
    k = 0
    while (name := library.variant_scalar(k)) is not None:
        yield name.decode()
        k += 1


class Bucket:
    """A case's tensors, as views of one array of each kind, and the metadata that a launch reads.

    arrays: the arrays named in :data:`ARRAYS`.
    numel: number of elements in the tensors, without the gaps that align them.
    slots, words, chunks: as in ``csrc/cuda/launch.h`` and ``csrc/layout.h``.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self._sizes = [prod(shape) for shape in case.shapes]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in self._sizes]
        self._offsets = [0, *accumulate(padded)]
        kind = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        self.arrays = [torch.randn(self._offsets[-1], **kind) for _ in ARRAYS]
        self.arrays[ARRAYS.index("exp_avg_sq")].square_()
        self.numel = sum(self._sizes)
        self.device = device
        addresses = {name: self._addresses(a) for name, a in zip(ARRAYS, self.arrays, strict=True)}
        self._grads = addresses.pop("grad")
        rows = zip(self._sizes, range(len(self._sizes)), *addresses.values(), strict=True)
        self.slots = torch.tensor(list(rows), dtype=torch.int64, device=device)
        self.control = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
        self._chunks: dict[int, Tensor] = {}
        self._words: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}

    @property
    def index(self) -> int:
        return 0 if self.device.type == "cpu" else torch.cuda.current_device()

    @property
    def stream(self) -> int | None:
        return None if self.device.type == "cpu" else torch.cuda.current_stream().cuda_stream

    def chunks(self, elements: int) -> Tensor:
        if elements not in self._chunks:
            sizes = torch.tensor(self._sizes)
            counts = (sizes + elements - 1) // elements
            slots = torch.repeat_interleave(counts)
            first = counts.cumsum(0) - counts
            places = torch.arange(len(slots)) - first[slots]
            pairs = torch.stack([slots, places], dim=1).to(torch.int32)
            self._chunks[elements] = pairs.to(self.device)
        return self._chunks[elements]

    def words(self, scalars: Sequence[float], grads_at: int) -> tuple[Tensor, Tensor]:
        """The words, on host and device: one row of scalars for all slots, and the gradients."""
        key = (*scalars, grads_at)
        if key not in self._words:
            words = torch.zeros(grads_at + len(self._sizes), dtype=torch.int64)
            row = torch.tensor([*scalars, EMA_WEIGHT], dtype=torch.float64).view(torch.int64)
            words[: len(row)] = row
            words[grads_at:] = torch.tensor(self._grads)
            self._words[key] = (words, words.to(self.device))
        return self._words[key]

    def _addresses(self, array: Tensor) -> list[int]:
        start, size = array.data_ptr(), array.element_size()
        return [start + size * offset for offset in self._offsets[:-1]]
