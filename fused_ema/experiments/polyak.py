"""Polyak averaging: evaluates the average of a supervised ResNet at several batch sizes.

The average does not affect the training, so one run keeps two of them: with ``rho**kappa``, the
rule, and with ``rho`` left alone. All batch sizes see the same samples in the same order.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .. import ProgressiveScaling, YoungAverageWarning
from ..ema.decay import Decay
from ..optim.options import EmaOptions
from .config import option
from .data import Data, load
from .distributed import Group
from .evaluation import score
from .folder import Folder
from .networks import backbone
from .optimizers import make_optimizer
from .recipe import ImageRecipe, Recipe
from .results import curves, gaps, last, seed_spread
from .training import Run, Session


@dataclass(frozen=True)
class Config(ImageRecipe):
    """Options of Polyak averaging."""

    optimizers: tuple[str, ...] = option(("SGD", "AdamW"), "SGD, AdamW or both", identity=False)
    label_smoothing: float = option(0.0, "share of the label spread over all classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.optimizers or not set(self.optimizers) <= {"SGD", "AdamW"}:
            raise ValueError(f"optimizers={self.optimizers!r}; allowed: SGD, AdamW or SGD,AdamW")


QUICK = Config(
    train_size=1024,
    kappas=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    lr=0.04,
    adamw_lr=4e-3,
    rho=0.98,
    epochs=10,
    evaluate_epochs=2,
)
CIFAR10 = Config(
    data="folder",
    model="resnet18",
    small_images=True,
    image_size=32,
    precision="bf16",
    workers=8,
    base_batch=128,
    kappas=(1.0, 4.0, 8.0),
    seeds=1,
    lr=0.05,
    weight_decay=5e-4,
    rho=0.999,
    epochs=30,
    warmup_epochs=3.0,
    optimizers=("SGD",),
)
# The paper's Polyak averaging, reconstructed.
PAPER = Config(
    data="folder",
    model="resnetv2_50",
    image_size=224,
    precision="bf16",
    per_device_batch=128,
    workers=12,
    base_batch=1024,
    kappas=(0.5, 1.0, 2.0, 4.0),
    lr=0.4,
    rho=0.9999,
    epochs=90,
    warmup_epochs=5.0,
    schedule="steps",
    label_smoothing=0.1,
    optimizers=("SGD",),
)
PRESETS = {"quick": QUICK, "cifar10": CIFAR10, "paper": PAPER}


def make_model(config: Config, data: Data) -> Any:
    """The network with new weights."""
    return backbone(config, data.channels, data.classes)


def views_of(config: Config) -> dict[int, int]:
    """Number of views of an image by their side."""
    return {config.image_size: 1}


def train(config: Config, run: Run, session: Session) -> None:
    """Train by Algorithm 1, SGD with progressive scaling; a fixed kappa is one stage."""
    torch.manual_seed(run.seed)
    place, data = session.place, session.data
    model = make_model(config, data).to(place.device)
    network = place.wrap(model)
    options: EmaOptions = {
        "model": model,
        "ema_buffers": config.ema_buffers,
        "backend": config.backend,
    }
    decays = tuple(averages(config, run).values())
    optimizer = make_optimizer(config, run, [(model, decays)], options)
    batch_sizes = {epoch: config.batch(kappa) for epoch, kappa in run.kappas.items()}
    scaling = ProgressiveScaling(optimizer, config.base_batch, batch_sizes)

    def evaluate() -> dict[str, float]:
        network, found = place.in_precision(model), {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", YoungAverageWarning)  # curves begin at the first step
            for index, average in enumerate(averages(config, run)):
                with optimizer.ema_weights(index):
                    found[average] = score(network, data.test, place, config.workers)
        found["weights"] = score(network, data.test, place, config.workers)
        return {f"{of}_{name}": x for of, values in found.items() for name, x in values.items()}

    training = session.start(run, model, optimizer, scaling, evaluate)
    for _ in training.epochs():
        for batch in training.batches():
            optimizer.zero_grad()
            for (images,), classes in batch.over(network):
                logits = network(images)
                loss = cross_entropy(logits, classes, label_smoothing=config.label_smoothing)
                (loss / len(batch)).backward()
            optimizer.step()
        scaling.step()


def averages(recipe: Recipe, run: Run) -> dict[str, Decay]:
    """Base decays of the averages: the rule's and, at a fixed kappa, the one for rho left alone.

    Both follow one training, while ``kappa_scales`` would need two. The second base decay becomes
    ``rho`` when it is raised to ``kappa``.
    """
    if len(run.kappas) > 1:
        return {"rule": recipe.rho}
    return {"rule": recipe.rho, "none": math.pow(recipe.rho, 1.0 / run.kappas[0])}


def fixed(optimizer: str, kappa: float, seed: int) -> Run:
    """A training at one batch size."""
    return Run(f"{optimizer}, kappa {kappa:g}", seed, {0: kappa}, optimizer)


def sessions(config: Config, folder: Folder, group: Group) -> list[Session]:
    """The trainings."""
    kinds = [(optimizer, kappa) for optimizer in config.optimizers for kappa in config.kappas]
    runs = [fixed(*kind, seed) for kind in kinds for seed in config.all_seeds]
    return [Session(config, folder, group, runs, load(config, 1))]


def run(config: Config, folder: Folder, group: Group) -> None:
    """Train every optimizer at every kappa with every seed, and summarise."""
    (its,) = sessions(config, folder, group)
    its.complete(train)
    if group.is_first:
        summarise(config, folder, its.rows())


def summarise(config: Config, folder: Folder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write final scores, gaps of averages and weights to kappa = 1, and the figure's curves."""
    summary, figure = [], []
    for optimizer in config.optimizers:
        names = {kappa: fixed(optimizer, kappa, 0).kind for kappa in config.kappas}
        for kappa, kind in names.items():
            for average in ("rule", "none", "weights"):
                base = curves(rows, names[1.0], f"{average}_loss")
                loss = curves(rows, kind, f"{average}_loss")
                accuracy = curves(rows, kind, f"{average}_accuracy")
                about = {"optimizer": optimizer, "kappa": kappa, "average": average}
                found = {"loss": last(loss), "accuracy": last(accuracy)}
                gap = gaps(loss, base)
                summary.append({**about, **found, "loss_gap": gap, "seeds": seed_spread(loss)})
                figure.append({**about, "loss": loss, "accuracy": accuracy})
    folder.write("summary.json", {"runs": summary})
    about = {"base_batch": config.base_batch, "rho": config.rho, "seeds": config.seeds}
    folder.write_figure({**about, "curves": figure})


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(["polyak", *sys.argv[1:]]))
