"""Progressive scaling, Algorithm 1: the batch grows during training, for polyak and byol.

It compares three ways to a batch of ``kappa`` base batches (from the start, from a chosen epoch on,
and by doublings) with a training that stays at the base batch size. All see the same samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from . import byol, polyak
from .config import option, positive
from .data import load
from .distributed import Group
from .folder import Folder
from .recipe import ImageRecipe, Resources
from .results import curves, gaps, last
from .training import Run, Session

TASKS: Mapping[str, Any] = {"polyak": polyak, "byol": byol}
VIEWS = {"polyak": 1, "byol": 2}
MEASURES = {"polyak": ("rule_loss", "rule_accuracy"), "byol": ("knn", "probe")}


@dataclass(frozen=True)
class Config(Resources):
    """Options of progressive scaling."""

    recipe: str = option(
        "quick", "preset of polyak and byol that is scaled", choices=("quick", "cifar10", "paper")
    )
    tasks: tuple[str, ...] = option(("polyak", "byol"), "polyak, byol or both")
    optimizer: str = option("SGD", "SGD or AdamW", choices=("SGD", "AdamW"))
    kappas: tuple[float, ...] = option(
        (8.0, 32.0), "largest kappas, each reached in three ways", identity=False
    )
    switch_epochs: tuple[int, ...] = option((2, 4), "epochs from which the batch is the large one")
    doubling_epochs: int = option(1, "epochs between doublings of the batch")
    epochs: int = option(12, "passes over the training images")
    seeds: int = option(3, "runs of each kind, with consecutive seeds", identity=False)
    first_seed: int = option(0, "the first of the seeds", identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "kappas", "switch_epochs", "doubling_epochs", "epochs", "seeds")
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks={self.tasks!r}; allowed: polyak, byol or polyak,byol")
        if max(self.switch_epochs) >= self.epochs:
            raise ValueError(
                f"switch_epochs={self.switch_epochs} with epochs={self.epochs}; allowed: below that"
            )


PRESETS = {
    "quick": Config(seeds=2, evaluate_epochs=2),
    "cifar10": Config(
        recipe="cifar10",
        data="folder",
        precision="bf16",
        per_device_batch=2048,
        workers=14,
        tasks=("byol",),
        kappas=(8.0,),
        switch_epochs=(10, 30),
        doubling_epochs=10,
        epochs=100,
        seeds=1,
        evaluate_epochs=5,
    ),
    "paper": Config(
        recipe="paper",
        data="folder",
        precision="bf16",
        per_device_batch=128,
        workers=12,
        tasks=("byol",),
        optimizer="AdamW",
        kappas=(6.0,),
        switch_epochs=(60,),
        doubling_epochs=30,
        epochs=300,
        seeds=1,
        evaluate_epochs=10,
    ),
}


def plans(config: Config) -> dict[str, dict[int, float]]:
    """The ways to scale, by name: ``kappa`` from each epoch on."""
    found = {"kappa 1": {0: 1.0}}
    for kappa in config.kappas:
        found[f"kappa {kappa:g}"] = {0: kappa}
        for epoch in config.switch_epochs:
            found[f"kappa {kappa:g} from epoch {epoch}"] = {0: 1.0, epoch: kappa}
        found[f"kappa {kappa:g} by doubling"] = doubling(kappa, config.doubling_epochs)
    return found


def doubling(kappa: float, every: int) -> dict[int, float]:
    """From 1 to ``kappa`` in factors of 2; the last is smaller unless ``kappa`` is a power of 2."""
    steps = math.ceil(math.log2(kappa))
    return {every * step: min(2.0**step, kappa) for step in range(steps + 1)}


def recipe(config: Config, task: str) -> ImageRecipe:
    """The preset of the task with this experiment's options."""
    chosen: ImageRecipe = TASKS[task].PRESETS[config.recipe]
    shared = {field.name: getattr(config, field.name) for field in fields(Resources)}
    if config.train_size is None:
        del shared["train_size"]
    return replace(
        chosen,
        **shared,
        kappas=(1.0, *config.kappas),
        epochs=config.epochs,
        seeds=config.seeds,
        first_seed=config.first_seed,
    )


def run(config: Config, folder: Folder, group: Group) -> None:
    """Train both tasks by every plan with every seed, and summarise."""
    found = sessions(config, folder, group)
    for task, its in zip(config.tasks, found, strict=True):
        its.complete(TASKS[task].train)
    if group.is_first:
        summarise(config, folder, [row for its in found for row in its.rows()])


def sessions(config: Config, folder: Folder, group: Group) -> list[Session]:
    """The trainings of each task."""
    return [session(config, task, folder, group) for task in config.tasks]


def session(config: Config, task: str, folder: Folder, group: Group) -> Session:
    """The trainings of one task."""
    its = recipe(config, task)
    runs = [
        Run(f"{task}, {name}", seed, kappas, config.optimizer)
        for name, kappas in plans(config).items()
        for seed in its.all_seeds
    ]
    return Session(its, folder, group, runs, load(its, VIEWS[task]))


def summarise(config: Config, folder: Folder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write final scores, gaps to kappa = 1, and the figure's curves."""
    summary, figure = [], []
    for task in config.tasks:
        for name, kappas in plans(config).items():
            about = {"task": task, "plan": name, "kappas": {str(e): k for e, k in kappas.items()}}
            found = {
                measure: curves(rows, f"{task}, {name}", measure) for measure in MEASURES[task]
            }
            base = {m: curves(rows, f"{task}, kappa 1", m) for m in found}
            results = {m: {**last(c), "gap": gaps(c, base[m])} for m, c in found.items()}
            summary.append({**about, **results})
            figure.append({**about, **found})
    folder.write("summary.json", {"runs": summary})
    folder.write_figure({"seeds": config.seeds, "curves": figure})


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(["progressive", *sys.argv[1:]]))
