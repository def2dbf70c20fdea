"""The cases: parameter shapes of known models, and extremes.

The models' shapes are timm's, stored in ``shapes.json``, so that a machine for measurements needs
neither timm nor weights. Only the sizes and the number of tensors matter to an optimizer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

Shape = tuple[int, ...]

LAYER_DECAY = 0.95

# Models by timm's names; ``python -m bench.cases`` writes the file again.
MODELS = {
    "resnet18": "resnet18",
    "resnetv2_50": "resnetv2_50",
    "vit_b16": "vit_base_patch16_224",
    "vit_l16": "vit_large_patch16_224",
}
SHAPES = Path(__file__).with_name("shapes.json")


@dataclass(frozen=True)
class Case:
    """Parameters to step, by shape.

    num_groups: number of param groups among which the tensors are divided, in order, each with its
    own learning rate.
    hot: gradients stay and steps follow each other, so that the processor's caches hold whatever
    fits. Otherwise every step gets new gradients, as in training.
    host_only: the device has almost nothing to do, so that the time is the host's.
    """

    name: str
    shapes: tuple[Shape, ...]
    num_groups: int = 1
    hot: bool = False
    host_only: bool = False

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def title(self) -> str:
        groups = f" in {self.num_groups} groups" if self.num_groups > 1 else ""
        tensors = f"{len(self.shapes):,} tensors{groups}"
        return f"{self.name}: {tensors}, {self.numel:,} parameters"

    @property
    def lr_factors(self) -> tuple[float, ...]:
        """The factor of each group's learning rate, which falls towards the input."""
        return tuple(LAYER_DECAY**depth for depth in reversed(range(self.num_groups)))

    @property
    def group_ends(self) -> tuple[int, ...]:
        """The number of tensors up to the end of each group."""
        return tuple(len(self.shapes) * (k + 1) // self.num_groups for k in range(self.num_groups))


def timm_shapes(model: str) -> list[Shape]:
    import torch
    from timm import create_model  # imported here, because nothing else needs timm

    with torch.device("meta"):
        return [tuple(param.shape) for param in create_model(model).parameters()]


def kept_shapes() -> dict[str, list[Shape]]:
    kept = json.loads(SHAPES.read_text())
    return {name: [tuple(shape) for shape in shapes] for name, shapes in kept.items()}


def make(name: str, shapes: Iterable[Shape]) -> Case:
    return Case(name, tuple(shapes))


_KEPT = {name: make(name, shapes) for name, shapes in kept_shapes().items()}
CASES = {
    case.name: case
    for case in (
        *_KEPT.values(),
        make("tiny_10000x64", [(64,)] * 10_000),
        make("one_100m", [(100_000_000,)]),
        replace(_KEPT["vit_b16"], name="groups50", num_groups=50),
    )
}


def shrunk(case: Case, by: int) -> Case:
    """The case with every tensor cut to a part of its rows, to try a benchmark out."""
    rows = ((max(1, shape[0] // by), *shape[1:]) if shape else shape for shape in case.shapes)
    return replace(case, shapes=tuple(rows))


# Numbers of tensors with hardly any elements, whose step is the host's work alone.
HOST_COUNTS = (1, 62, 152, 400, 1000)


def host_cases(hot: bool, elements: int) -> list[Case]:
    cases = [make(f"host_{'hot_' if hot else ''}{n}", [(elements,)] * n) for n in HOST_COUNTS]
    return [replace(case, hot=hot, host_only=True) for case in cases]


def main() -> None:
    about = "Writes the models' shapes, read from timm, into bench/shapes.json."
    argparse.ArgumentParser(prog="python -m bench.cases", description=about).parse_args()
    fresh = {name: timm_shapes(model) for name, model in MODELS.items()}
    lines = (f'"{name}": {json.dumps(shapes)}' for name, shapes in fresh.items())
    SHAPES.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
