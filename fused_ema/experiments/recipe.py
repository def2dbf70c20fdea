"""Options that the trainings share: device, data, and the recipe at kappa = 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .. import CosineDecay
from ..ema.buffers import EmaBuffersMode
from ..ema.decay import Decay
from ..step.backends import BackendName
from .config import option, positive

SCHEDULES = ("constant", "cosine", "steps")


@dataclass(frozen=True)
class Resources:
    """Options of data, machine and files."""

    data: str = option(
        "digits", "digits: scikit-learn's; folder: --data-root", choices=("digits", "folder")
    )
    data_root: Path | None = option(
        None, "folder with train/CLASS/* and val/CLASS/* or test/CLASS/* images"
    )
    train_size: int | None = option(
        None, "number of training images, the first of a fixed shuffle; none: all"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", identity=False)
    precision: str = option(
        "float32", "precision of the forward pass; weights are float32", choices=("float32", "bf16")
    )
    per_device_batch: int = option(
        1024, "largest forward pass of a process, in samples; larger batches are accumulated"
    )
    workers: int = option(
        0, "processes that load images, for each training process", identity=False
    )
    backend: BackendName = option(
        "auto", "backend of the optimizer: auto, native, triton, foreach, reference"
    )
    checkpoint_epochs: int = option(1, "epochs between checkpoints", identity=False)
    checkpoint_minutes: float = option(
        30.0, "minutes between checkpoints within an epoch", identity=False
    )
    tensorboard: bool = option(False, "write TensorBoard's scalars too", identity=False)
    evaluate_epochs: int = option(1, "epochs between evaluations")

    def __post_init__(self) -> None:
        positive(self, "per_device_batch", "checkpoint_epochs", "evaluate_epochs")
        positive(self, "checkpoint_minutes")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} is out of range; allowed: 0 or more")


@dataclass(frozen=True)
class Recipe(Resources):
    """A training at the base batch size, and the batch sizes to which it is scaled."""

    base_batch: int = option(32, "batch size of the recipe, over all processes")
    kappas: tuple[float, ...] = option(
        (1.0,), "batch sizes in base batches; fractions are allowed", identity=False
    )
    seeds: int = option(3, "runs of each kind, with consecutive seeds", identity=False)
    first_seed: int = option(0, "the first of the seeds", identity=False)
    epochs: int = option(20, "passes over the training images")
    lr: float = option(0.1, "base learning rate of SGD")
    momentum: float = option(0.9, "momentum of SGD, the same at every kappa")
    weight_decay: float = option(1e-4, "weight decay of SGD; none on biases and norms")
    adamw_lr: float = option(1e-3, "base learning rate of AdamW")
    adamw_weight_decay: float = option(0.05, "weight decay of AdamW; none on biases and norms")
    beta1: float = option(0.9, "base beta1 of AdamW")
    beta2: float = option(0.999, "base beta2 of AdamW")
    schedule: str = option("cosine", "shape of the learning rate", choices=SCHEDULES)
    warmup_epochs: float = option(1.0, "epochs in which the learning rate rises from 0")
    rho: float = option(0.99, "base decay of the average")
    ema_buffers: EmaBuffersMode = option(
        "average", "BatchNorm's statistics of the averaged model", choices=("average", "copy")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "base_batch", "kappas", "seeds", "epochs")
        for kappa in self.kappas:
            self.batch(kappa)
        if 1.0 not in self.kappas:
            raise ValueError(f"kappas={self.kappas} lacks 1, which the others are compared with")

    @property
    def all_seeds(self) -> range:
        """The seeds of the runs of each kind."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def batch(self, kappa: float) -> int:
        """The batch size at ``kappa``.

        Raises:
            ValueError: it is not a whole number.
        """
        batch = kappa * self.base_batch
        if batch != round(batch) or batch < 1:
            raise ValueError(
                f"kappas: {kappa:g} x base_batch={self.base_batch} is {batch:g}; allowed: whole "
                "batch sizes"
            )
        return round(batch)

    def lr_factor(self, epoch: float) -> float:
        """Factor of the base learning rate after ``epoch`` epochs.

        ``"cosine"`` falls to 0 at the end; ``"steps"`` divides by 10 at 30/90, 60/90 and 80/90.
        """
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.schedule == "steps":
            return 0.1 ** sum(90 * epoch >= mark * self.epochs for mark in (30, 60, 80))
        if self.schedule == "cosine":
            done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return (1.0 + math.cos(math.pi * min(done, 1.0))) / 2.0
        return 1.0


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """A training on images."""

    model: str = option("resnet-digits", "resnet-digits, or a model of timm")
    drop_path: float = option(0.0, "rate of stochastic depth, for models of timm that have it")
    small_images: bool = option(False, "a 3x3 stem without pooling in place of ImageNet's")
    image_size: int = option(8, "side of the square images that the network sees")
    local_size: int = option(96, "side of the views beyond the second, DINO's local crops")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "image_size", "local_size")


@dataclass(frozen=True)
class TeacherRecipe(ImageRecipe):
    """A training on images whose loss uses the average."""

    rho_schedule: str = option(
        "constant", "cosine: rho rises to 1 over the training", choices=("constant", "cosine")
    )

    def teacher_decay(self, epoch_size: int) -> Decay:
        """The teacher's base decay, whose schedule counts base steps."""
        if self.rho_schedule == "constant":
            return self.rho
        return CosineDecay(self.rho, self.epochs * epoch_size / self.base_batch)
