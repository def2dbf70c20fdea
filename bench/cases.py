"""What is stepped: parameter shapes of known models, and the extremes.

Shapes are generated here, so that no model library and no weights are needed. Only their sizes
and their number matter to an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

Shape = tuple[int, ...]

CLASSES = 1000
RGB = 3
LAYER_DECAY = 0.95


@dataclass(frozen=True)
class Case:
    """Parameters to step, by shape.

    num_groups: param groups that the tensors are dealt out to, in order, each with a learning rate
        of its own.
    hot: gradients stay and steps follow each other, so that the processor's caches hold whatever
        fits. Otherwise every step gets new gradients, as in training.
    host_only: next to nothing for a device to do: the time is the host's.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32
    num_groups: int = 1
    hot: bool = False
    host_only: bool = False

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        groups = f" in {self.num_groups} groups" if self.num_groups > 1 else ""
        tensors = f"{len(self.shapes):,} tensors{groups}"
        return f"{self.name}: {tensors}, {self.numel:,} parameters, {dtype}"

    @property
    def lr_factors(self) -> tuple[float, ...]:
        """One a group, falling towards the input: layer-wise learning rates."""
        return tuple(LAYER_DECAY**depth for depth in reversed(range(self.num_groups)))

    @property
    def group_ends(self) -> tuple[int, ...]:
        """How many tensors there are up to the end of each group."""
        return tuple(len(self.shapes) * (k + 1) // self.num_groups for k in range(self.num_groups))


def linear(inputs: int, outputs: int) -> Iterator[Shape]:
    yield from ((outputs, inputs), (outputs,))


def norm(channels: int) -> Iterator[Shape]:
    yield from ((channels,), (channels,))


def conv_norm(inputs: int, outputs: int, kernel: int) -> Iterator[Shape]:
    """A convolution without bias and its batch norm."""
    yield (outputs, inputs, kernel, kernel)
    yield from norm(outputs)


def basic_block(inputs: int, outputs: int) -> Iterator[Shape]:
    yield from conv_norm(inputs, outputs, 3)
    yield from conv_norm(outputs, outputs, 3)
    if inputs != outputs:
        yield from conv_norm(inputs, outputs, 1)


def resnet18() -> Iterator[Shape]:
    """He et al. 2016: two basic blocks at each of four widths."""
    widths = (64, 128, 256, 512)
    yield from conv_norm(RGB, widths[0], 7)
    for before, width in zip((widths[0], *widths), widths, strict=False):
        yield from basic_block(before, width)
        yield from basic_block(width, width)
    yield from linear(widths[-1], CLASSES)


def encoder_block(width: int, hidden: int) -> Iterator[Shape]:
    yield from norm(width)
    yield from linear(width, 3 * width)  # query, key and value in one
    yield from linear(width, width)
    yield from norm(width)
    yield from linear(width, hidden)
    yield from linear(hidden, width)


def vit(width: int, depth: int, patch: int, image: int = 224) -> Iterator[Shape]:
    """Dosovitskiy et al. 2021, with a class token and learned positions."""
    patches = (image // patch) ** 2
    yield (1, 1, width)
    yield (1, patches + 1, width)
    yield from ((width, RGB, patch, patch), (width,))
    for _ in range(depth):
        yield from encoder_block(width, 4 * width)
    yield from norm(width)
    yield from linear(width, CLASSES)


def make(name: str, shapes: Iterable[Shape]) -> Case:
    return Case(name, tuple(shapes))


CASES = {
    case.name: case
    for case in (
        make("resnet18", resnet18()),
        make("vit_b16", vit(width=768, depth=12, patch=16)),
        make("tiny_400x64", [(64,)] * 400),
        make("one_100m", [(100_000_000,)]),
    )
}

# Also what a processor would take too long for.
GPU_CASES = {
    **CASES,
    "vit_l16": make("vit_l16", vit(width=1024, depth=24, patch=16)),
    "groups50": replace(CASES["vit_b16"], name="groups50", num_groups=50),
}

# Tensors of no or hardly any elements: all that remains of a step is what the host does.
HOST_COUNTS = (1, 62, 152, 400, 1000)


def host_cases(hot: bool, elements: int) -> list[Case]:
    cases = [make(f"host_{'hot_' if hot else ''}{n}", [(elements,)] * n) for n in HOST_COUNTS]
    return [replace(case, hot=hot, host_only=True) for case in cases]
