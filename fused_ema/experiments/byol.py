"""BYOL: the target network is the fused average of the online network, and the loss uses it.

Grill et al. 2020 (arXiv 2006.07733): for two views of an image, the online network's prediction
from one must match the target network's projection of the other, and vice versa. So the EMA rule
affects the training itself: ``rho**kappa``, or ``rho`` left alone, at ``kappa`` times the batch.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .. import ProgressiveScaling
from ..optim.options import EmaOptions
from .config import option, positive
from .data import Data, load
from .distributed import Group
from .evaluation import SCORES, feature_scores
from .folder import Folder
from .networks import backbone, mlp
from .optimizers import make_optimizer
from .recipe import TeacherRecipe
from .results import compared
from .training import Run, Session


@dataclass(frozen=True)
class Config(TeacherRecipe):
    """Options of BYOL."""

    optimizer: str = option("SGD", "SGD or AdamW", choices=("SGD", "AdamW"))
    hidden: int = option(128, "width of projector and predictor")
    projection: int = option(32, "outputs of projector and predictor")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "hidden", "projection")


QUICK = Config(
    train_size=1536,
    base_batch=16,
    kappas=(1.0, 8.0),
    lr=0.1,
    momentum=0.0,
    rho=0.998,
    epochs=40,
    warmup_epochs=2.0,
    evaluate_epochs=4,
    ema_buffers="copy",
)
# The paper's BYOL with ResNet-18 on CIFAR-10; learning rate, epochs and warm-up are not from it.
CIFAR10 = Config(
    data="folder",
    model="resnet18",
    small_images=True,
    image_size=32,
    precision="bf16",
    per_device_batch=2048,
    workers=14,
    base_batch=1024,
    kappas=(1.0, 8.0),
    seeds=1,
    lr=0.1,
    rho=0.992,
    epochs=100,
    warmup_epochs=10.0,
    evaluate_epochs=5,
    hidden=2048,
    projection=128,
    ema_buffers="copy",
)
# The paper's BYOL with ViT-B/16, reconstructed.
PAPER = Config(
    data="folder",
    model="vit_base_patch16_224",
    image_size=224,
    precision="bf16",
    per_device_batch=128,
    workers=12,
    base_batch=4096,
    kappas=(1.0, 6.0),
    seeds=1,
    optimizer="AdamW",
    adamw_lr=3e-4,
    adamw_weight_decay=0.3,
    beta1=0.9,
    beta2=0.95,
    rho=0.99,
    epochs=300,
    warmup_epochs=40.0,
    evaluate_epochs=10,
    hidden=4096,
    projection=256,
    ema_buffers="copy",
)
PRESETS = {"quick": QUICK, "cifar10": CIFAR10, "paper": PAPER}


class Target(nn.Module):
    """Encoder and projector."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return a projection ``[n, projection]`` of each view."""
        return tuple(self.projector(self.encoder(view)) for view in views)


class Online(Target):
    """Encoder, projector and predictor."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module) -> None:
        super().__init__(encoder, projector)
        self.predictor = predictor

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return a prediction ``[n, projection]`` from each view."""
        return tuple(self.predictor(projection) for projection in super().forward(*views))


def make_model(config: Config, data: Data) -> Online:
    """The online network with new weights."""
    encoder = backbone(config, data.channels, classes=0)
    projector = mlp(encoder.num_features, config.hidden, config.projection)
    return Online(encoder, projector, mlp(config.projection, config.hidden, config.projection))


def views_of(config: Config) -> dict[int, int]:
    """Number of views of an image by their side."""
    return {config.image_size: 2}


def make_target(online: Online) -> Target:
    """A copy of the online network's encoder and projector."""
    parts = copy.deepcopy(online.encoder), copy.deepcopy(online.projector)
    return Target(*parts).requires_grad_(False)


def regression_loss(predictions: Tensor, projections: Tensor) -> Tensor:
    """``2 - 2*cos(prediction, projection)``, the mean over the batch (BYOL, Equation 2)."""
    return 2.0 - 2.0 * cosine_similarity(predictions, projections, dim=1).mean()


def train(config: Config, run: Run, session: Session) -> None:
    """Train by Algorithm 1 with BYOL's loss, which uses the average; a fixed kappa is one stage."""
    torch.manual_seed(run.seed)
    place, data = session.place, session.data
    model = make_model(config, data).to(place.device)
    average = make_target(model)
    online, target = place.wrap(model), place.in_precision(average)
    decay = config.teacher_decay(session.epoch_size)
    parts = [(model.encoder, decay), (model.projector, decay), (model.predictor, None)]
    options: EmaOptions = {
        "teacher": average,
        "model": model,
        "kappa_scales": "all" if run.rule else "optimizer",
        "ema_buffers": config.ema_buffers,
        "backend": config.backend,
    }
    optimizer = make_optimizer(config, run, parts, options)
    batch_sizes = {epoch: config.batch(kappa) for epoch, kappa in run.kappas.items()}
    scaling = ProgressiveScaling(optimizer, config.base_batch, batch_sizes)

    def evaluate() -> dict[str, float]:
        return feature_scores(place.in_precision(model.encoder), data, place, config.workers)

    training = session.start(run, model, optimizer, scaling, evaluate)
    for _ in training.epochs():
        for batch in training.batches():
            optimizer.zero_grad()
            for (view_1, view_2), _ in batch.over(online):
                prediction_1, prediction_2 = online(view_1, view_2)
                with torch.no_grad():
                    projection_1, projection_2 = target(view_1, view_2)
                loss = regression_loss(prediction_1, projection_2)
                loss = loss + regression_loss(prediction_2, projection_1)
                (loss / len(batch)).backward()
            optimizer.step()
        scaling.step()


def fixed(config: Config, kappa: float, seed: int, rule: bool = True) -> Run:
    """A training at one batch size."""
    kind = f"{config.optimizer}, kappa {kappa:g}" + ("" if rule else ", rho left alone")
    return Run(kind, seed, {0: kappa}, config.optimizer, rule)


def kinds(config: Config) -> list[tuple[float, bool]]:
    """What the trainings differ in except for the seed: kappa, and whether rho follows the rule."""
    return [(kappa, rule) for kappa in config.kappas for rule in (True, False)[: 1 + (kappa != 1)]]


def sessions(config: Config, folder: Folder, group: Group) -> list[Session]:
    """The trainings."""
    runs = [
        fixed(config, kappa, seed, rule)
        for kappa, rule in kinds(config)
        for seed in config.all_seeds
    ]
    return [Session(config, folder, group, runs, load(config, 2))]


def run(config: Config, folder: Folder, group: Group) -> None:
    """Train at every kappa, with and without the rule, with every seed, and summarise."""
    (its,) = sessions(config, folder, group)
    its.complete(train)
    if group.is_first:
        summarise(config, folder, its.rows())


def summarise(
    config: Config,
    folder: Folder,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write the scores at random weights and at the end, and the figure's curves."""
    about = {
        fixed(config, kappa, 0, rule).kind: {"kappa": kappa, "average": "rule" if rule else "none"}
        for kappa, rule in kinds(config)
    }
    summary, figure = compared(rows, about, SCORES)
    folder.write("summary.json", summary)
    shared = {"base_batch": config.base_batch, "rho": config.rho, "seeds": config.seeds}
    folder.write_figure({**shared, "curves": figure})


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(["byol", *sys.argv[1:]]))
