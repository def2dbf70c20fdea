"""BatchNorm: its running statistics are averages too, so their decay follows the rule, or not.

A network with BatchNorm is trained at the base batch size and at ``kappa`` times it; there
``scale_batchnorm_momentum`` raises the statistics' decay to ``kappa``, or it is left alone. Early
in the training, statistics that lag are those of weights of long ago.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import option
from .data import load
from .distributed import Group
from .folder import Folder
from .polyak import Config as PolyakConfig
from .polyak import make_model, train, views_of
from .results import compared
from .training import Run, Session

MEASURES = ("weights_loss", "weights_accuracy")


@dataclass(frozen=True)
class Config(PolyakConfig):
    """Options of the BatchNorm experiment; it trains as Polyak averaging does."""

    optimizers: tuple[str, ...] = option(("AdamW",), "SGD or AdamW", identity=False)


QUICK = Config(
    train_size=1024,
    base_batch=8,
    kappas=(1.0, 16.0),
    rho=0.998,
    epochs=8,
    warmup_epochs=0.0,
    schedule="constant",
)
CIFAR10 = Config(
    data="folder",
    model="resnet18",
    small_images=True,
    image_size=32,
    precision="bf16",
    per_device_batch=4096,
    workers=8,
    base_batch=128,
    kappas=(1.0, 16.0),
    seeds=1,
    rho=0.999,
    epochs=10,
)
PAPER = Config(
    data="folder",
    model="resnetv2_50",
    image_size=224,
    precision="bf16",
    per_device_batch=128,
    workers=12,
    base_batch=1024,
    kappas=(1.0, 4.0),
    seeds=1,
    rho=0.9999,
    epochs=10,
)
__all__ = ["PRESETS", "Config", "make_model", "run", "sessions", "views_of"]
PRESETS = {"quick": QUICK, "cifar10": CIFAR10, "paper": PAPER}


def fixed(optimizer: str, kappa: float, norm_rule: bool, seed: int) -> Run:
    """A training at one batch size."""
    kind = f"{optimizer}, kappa {kappa:g}" + ("" if norm_rule else ", statistics left alone")
    return Run(kind, seed, {0: kappa}, optimizer, norm_rule=norm_rule)


def kinds(config: Config) -> list[tuple[str, float, bool]]:
    """What the trainings differ in except for the seed."""
    return [
        (optimizer, kappa, norm_rule)
        for optimizer in config.optimizers
        for kappa in config.kappas
        for norm_rule in (True, False)[: 1 + (kappa != 1)]
    ]


def sessions(config: Config, folder: Folder, group: Group) -> list[Session]:
    """The trainings."""
    runs = [fixed(*kind, seed) for kind in kinds(config) for seed in config.all_seeds]
    return [Session(config, folder, group, runs, load(config, 1))]


def run(config: Config, folder: Folder, group: Group) -> None:
    """Train at every kappa, with and without the rule for the statistics, and summarise."""
    (its,) = sessions(config, folder, group)
    its.complete(train)
    if group.is_first:
        summarise(config, folder, its.rows())


def summarise(
    config: Config,
    folder: Folder,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write the weights' scores at the end, and the figure's curves."""
    about = {
        fixed(optimizer, kappa, rule, 0).kind: {
            "optimizer": optimizer,
            "kappa": kappa,
            "average": "rule" if rule else "none",
        }
        for optimizer, kappa, rule in kinds(config)
    }
    summary, figure = compared(rows, about, MEASURES)
    folder.write("summary.json", summary)
    shared = {"base_batch": config.base_batch, "seeds": config.seeds}
    folder.write_figure({**shared, "curves": figure})


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(["batchnorm", *sys.argv[1:]]))
