"""Options that the trainings share: device, data, and the recipe at kappa = 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..ema.buffers import EmaBuffersMode
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
    evaluate_epochs: int = option(1, "epochs between evaluations")

    def __post_init__(self) -> None:
        positive(self, "per_device_batch", "checkpoint_epochs", "evaluate_epochs")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} is out of range; allowed: 0 or more")


@dataclass(frozen=True)
class Recipe(Resources):
    """A training at the base batch size, and the batch sizes to which it is scaled."""

    model: str = option("resnet-digits", "resnet-digits, or a model of timm")
    small_images: bool = option(False, "a 3x3 stem without pooling in place of ImageNet's")
    image_size: int = option(8, "side of the square images that the network sees")
    base_batch: int = option(32, "batch size of the recipe, over all processes")
    kappas: tuple[float, ...] = option((1.0,), "batch sizes in base batches; fractions are allowed")
    seeds: int = option(3, "runs of each kind, with seeds 0, 1, ...")
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
        positive(self, "base_batch", "kappas", "seeds", "epochs", "image_size")
        for kappa in self.kappas:
            self.batch(kappa)
        if 1.0 not in self.kappas:
            raise ValueError(f"kappas={self.kappas} lacks 1, which the others are compared with")

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
