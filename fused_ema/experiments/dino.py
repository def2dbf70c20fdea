"""DINO: the teacher is the fused average of the student, and its outputs' centre is another one.

Caron et al. 2021 (arXiv 2104.14294): the student's output for one view of an image must match the
teacher's for another, after softmax. The teacher's outputs are centred by their running mean, and
sharpened by a low temperature. Both averages follow the rule at ``kappa`` times the batch,
``rho**kappa`` and ``centre_decay**kappa``, or either is left alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax

from .. import ProgressiveScaling
from ..optim.options import EmaOptions
from ..scaling import ema_rate
from .config import option, positive
from .data import Data, load
from .distributed import Group
from .evaluation import SCORES, feature_scores
from .folder import Folder
from .networks import DinoHead, backbone
from .optimizers import make_optimizer
from .recipe import TeacherRecipe
from .results import compared
from .training import Run, Session

# Which of the two averages follow the rule.
RULES = ("both", "rho", "centre", "none")


@dataclass(frozen=True)
class Config(TeacherRecipe):
    """Options of DINO."""

    rules: tuple[str, ...] = option(
        RULES, "averages that follow the rule, each a run of its own", identity=False
    )
    centre_decay: float = option(0.9, "base decay of the centre of the teacher's outputs")
    temperature: float = option(0.1, "temperature of the student")
    teacher_temperature: float = option(0.02, "temperature of the teacher after its warm-up")
    teacher_temperature_start: float = option(0.02, "temperature of the teacher at the start")
    teacher_temperature_epochs: int = option(0, "epochs of the temperature's linear warm-up")
    clip: float = option(3.0, "largest norm of the gradient")
    frozen_epochs: int = option(1, "epochs in which the last layer stays as it is")
    local_crops: int = option(0, "small views of an image, for the student only")
    hidden: int = option(128, "width of the head")
    bottleneck: int = option(32, "inputs of the head's last layer")
    outputs: int = option(64, "outputs of the head")
    head_norm: bool = option(True, "BatchNorm in the head")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "temperature", "teacher_temperature", "teacher_temperature_start", "clip")
        positive(self, "hidden", "bottleneck", "outputs")
        if not self.rules or not set(self.rules) <= set(RULES):
            raise ValueError(f"rules={self.rules!r}; allowed: {', '.join(RULES)}")

    def teacher_temperature_at(self, epoch: int) -> float:
        """The teacher's temperature in an epoch."""
        start, end = self.teacher_temperature_start, self.teacher_temperature
        if epoch >= self.teacher_temperature_epochs:
            return end
        return start + (end - start) * epoch / self.teacher_temperature_epochs


QUICK = Config(
    train_size=1536,
    base_batch=16,
    kappas=(1.0, 8.0),
    adamw_weight_decay=0.04,
    rho=0.996,
    epochs=30,
    warmup_epochs=2.0,
    evaluate_epochs=5,
    ema_buffers="copy",
)
# ResNet-18 on CIFAR-10 by one GPU; not from the paper.
CIFAR10 = Config(
    data="folder",
    model="resnet18",
    small_images=True,
    image_size=32,
    precision="bf16",
    per_device_batch=2048,
    workers=14,
    base_batch=256,
    kappas=(1.0, 8.0),
    seeds=1,
    adamw_weight_decay=0.04,
    rho=0.996,
    epochs=100,
    warmup_epochs=10.0,
    evaluate_epochs=5,
    hidden=2048,
    bottleneck=256,
    outputs=4096,
    ema_buffers="copy",
)
# DINO's public recipe for ViT-B/16 with 2 + 10 views, at the paper's base batch (reconstructed).
PAPER = Config(
    data="folder",
    model="vit_base_patch16_224",
    drop_path=0.1,
    image_size=224,
    local_size=96,
    precision="bf16",
    per_device_batch=32,
    workers=12,
    base_batch=1024,
    kappas=(1.0, 4.0),
    seeds=1,
    rules=("both",),
    adamw_lr=3e-3,
    adamw_weight_decay=0.04,
    rho=0.996,
    rho_schedule="cosine",
    epochs=400,
    warmup_epochs=10.0,
    evaluate_epochs=10,
    teacher_temperature=0.07,
    teacher_temperature_start=0.04,
    teacher_temperature_epochs=50,
    clip=0.3,
    frozen_epochs=3,
    local_crops=10,
    hidden=2048,
    bottleneck=256,
    outputs=65536,
    head_norm=False,
    ema_buffers="copy",
)
PRESETS = {"quick": QUICK, "cifar10": CIFAR10, "paper": PAPER}


class Centre(nn.Module):
    """The running mean of the teacher's outputs, without which all images get the same target."""

    mean: Tensor

    def __init__(self, outputs: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(outputs))

    def update(self, mean: Tensor, kappa: float) -> None:
        """Move towards the mean of a batch of ``kappa`` base batches, as as many base steps do."""
        self.mean.lerp_(mean, ema_rate(self.decay, kappa))


class Teacher(nn.Module):
    """Encoder and head."""

    def __init__(self, encoder: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs ``[n, outputs]`` for each view."""
        return tuple(self.head(self.encoder(view)) for view in views)


class Student(Teacher):
    """Encoder and head, which are trained, and the centre, which is saved with them."""

    def __init__(self, encoder: nn.Module, head: DinoHead, centre: Centre) -> None:
        super().__init__(encoder, head)
        self.centre = centre


def make_model(config: Config, data: Data) -> Student:
    """The student with new weights."""
    encoder = backbone(config, data.channels, classes=0)
    sizes = encoder.num_features, config.hidden, config.bottleneck, config.outputs
    centre = Centre(config.outputs, config.centre_decay)
    return Student(encoder, DinoHead(*sizes, norm=config.head_norm), centre)


def views_of(config: Config) -> dict[int, int]:
    """Number of views of an image by their side."""
    if not config.local_crops or config.local_size == config.image_size:
        return {config.image_size: 2 + config.local_crops}
    return {config.image_size: 2, config.local_size: config.local_crops}


def make_teacher(student: Student) -> Teacher:
    """A copy of the student's encoder and head."""
    return Teacher(copy.deepcopy(student.encoder), copy.deepcopy(student.head)).requires_grad_(
        False
    )


def distillation_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float
) -> Tensor:
    """Cross-entropy of the student's views against the teacher's other views, their mean.

    Args:
        students: outputs for every view.
        teachers: the teacher's probabilities for the first views.
        temperature: temperature of the student.
    """
    logs = [log_softmax(output / temperature, dim=1) for output in students]
    losses = [
        -(target * log).sum(1).mean()
        for i, target in enumerate(teachers)
        for j, log in enumerate(logs)
        if i != j
    ]
    return torch.stack(losses).mean()


def train(config: Config, run: Run, session: Session) -> None:
    """Train by Algorithm 1 with DINO's loss, which uses the average; a fixed kappa is one stage."""
    torch.manual_seed(run.seed)
    place, data = session.place, session.data
    model = make_model(config, data).to(place.device)
    average = make_teacher(model)
    student, teacher = place.wrap(model), place.in_precision(average)
    decay = config.teacher_decay(session.epoch_size)
    options: EmaOptions = {
        "teacher": average,
        "model": model,
        "kappa_scales": "all" if run.rule else "optimizer",
        "max_grad_norm": config.clip,
        "ema_buffers": config.ema_buffers,
        "backend": config.backend,
    }
    parts = [(model.encoder, decay), (model.head, decay)]
    optimizer = make_optimizer(config, run, parts, options)
    batch_sizes = {epoch: config.batch(kappa) for epoch, kappa in run.kappas.items()}
    scaling = ProgressiveScaling(optimizer, config.base_batch, batch_sizes)

    def evaluate() -> dict[str, float]:
        return feature_scores(place.in_precision(average.encoder), data, place, config.workers)

    training = session.start(run, model, optimizer, scaling, evaluate)
    for epoch in training.epochs():
        sharpness = config.teacher_temperature_at(epoch)
        for batch in training.batches():
            optimizer.zero_grad()
            means = []
            for views, _ in batch.over(student):
                with torch.no_grad():
                    outputs = teacher(*views[:2])
                    targets = [softmax((o - model.centre.mean) / sharpness, 1) for o in outputs]
                means.append(torch.cat(outputs).mean(0))
                loss = distillation_loss(student(*views), targets, config.temperature)
                (loss / len(batch)).backward()
            if epoch < config.frozen_epochs:
                model.head.last.weight.grad = None
            optimizer.step()
            mean = session.group.total(torch.stack(means).mean(0)) / session.group.world
            model.centre.update(mean, scaling.kappa if run.centre_rule else 1.0)
        scaling.step()


def fixed(kappa: float, rules: str, seed: int) -> Run:
    """A training at one batch size."""
    kind = f"kappa {kappa:g}, {rules}"
    rule, centre_rule = rules in ("both", "rho"), rules in ("both", "centre")
    return Run(kind, seed, {0: kappa}, "AdamW", rule, centre_rule=centre_rule)


def kinds(config: Config) -> list[tuple[float, str]]:
    """What the trainings differ in except for the seed: kappa, and what follows the rule."""
    return [
        (kappa, rules)
        for kappa in config.kappas
        for rules in (config.rules if kappa != 1 else ("both",))
    ]


def sessions(config: Config, folder: Folder, group: Group) -> list[Session]:
    """The trainings."""
    runs = [fixed(*kind, seed) for kind in kinds(config) for seed in config.all_seeds]
    return [Session(config, folder, group, runs, load(config, 2 + config.local_crops))]


def run(config: Config, folder: Folder, group: Group) -> None:
    """Train at every kappa, by every choice of the rules, with every seed, and summarise."""
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
        fixed(kappa, rules, 0).kind: {"kappa": kappa, "average": rules}
        for kappa, rules in kinds(config)
    }
    summary, figure = compared(rows, about, SCORES)
    folder.write("summary.json", summary)
    shared = {"base_batch": config.base_batch, "rho": config.rho, "seeds": config.seeds}
    folder.write_figure({**shared, "curves": figure})


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main(["dino", *sys.argv[1:]]))
