"""Part 1: AdamW and a hand-written EMA, and the same training with the fused optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import FusedScaledAdamW
from .console import Progress, table
from .problem import Digits, Score, evaluate, minibatches, network

BATCH = 32
LR = 1e-3
RHO = 0.99
SEED = 0

# At each step a weight, and then its average, is rounded about four times, each time by at most
# 2**-24 of itself; so are the values that it is compared with. Errors that never cancel would add
# up.
ROUNDINGS = 8
UNIT_ROUNDOFF = 2.0**-24


class Trained(NamedTuple):
    """Weights and their average after training, each as one vector, and the average's score."""

    weights: Tensor
    average: Tensor
    score: Score


class Difference(NamedTuple):
    """Largest difference of an element, and the relative norm of the difference."""

    largest: float
    relative: float


@dataclass(frozen=True)
class Agreement:
    """The trainings of this library and of torch, and a scale for their difference.

    Attributes:
        steps: optimizer steps of each training.
        ours: the training by FusedScaledAdamW.
        by_hand: the training by torch's for-loop and a hand-written EMA.
        float64: the training by torch's for-loop in float64.
    """

    steps: int
    ours: Trained
    by_hand: Trained
    float64: Trained

    def budget(self, values: Tensor) -> Difference:
        """The differences that rounding alone would cause if it never cancelled.

        They do not include how gradients respond to weights that already differ: this is a scale
        for comparison, not a proven bound.
        """
        relative = self.steps * ROUNDINGS * UNIT_ROUNDOFF
        return Difference(relative * values.abs().max().item(), relative)

    def within_budget(self) -> bool:
        """Whether our weights and average are both within the budget."""
        return all(
            found <= allowed
            for mine, theirs in zip(self.ours[:2], self.by_hand[:2], strict=True)
            for found, allowed in zip(difference(mine, theirs), self.budget(theirs), strict=True)
        )


def train_by_hand(
    data: Digits,
    epochs: int,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """Train with torch's AdamW and the usual lines for an EMA."""
    model = network(SEED).to(dtype)
    data = data.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, foreach=False)
    average = copy.deepcopy(model)
    for images, classes in minibatches(data, BATCH, epochs, SEED):
        optimizer.zero_grad()
        cross_entropy(model(images), classes).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, param in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(RHO).add_(param, alpha=1 - RHO)
        progress.advance()
    return Trained(flat(model.parameters()), flat(average.parameters()), evaluate(average, data))


def train_fused(data: Digits, epochs: int, progress: Progress) -> Trained:
    """Train with the EMA inside the optimizer's step."""
    model = network(SEED)
    optimizer = FusedScaledAdamW(model.parameters(), lr=LR, ema_decay=RHO)
    for images, classes in minibatches(data, BATCH, epochs, SEED):
        optimizer.zero_grad()
        cross_entropy(model(images), classes).backward()
        optimizer.step()
        progress.advance()
    weights = flat(model.parameters())
    with optimizer.ema_weights():
        return Trained(weights, flat(model.parameters()), evaluate(model, data))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all elements as one float64 vector."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def difference(mine: Tensor, theirs: Tensor) -> Difference:
    """The difference of two vectors."""
    delta = mine - theirs
    return Difference(delta.abs().max().item(), (delta.norm() / theirs.norm()).item())


def run(data: Digits, epochs: int) -> Agreement:
    """Train three times from the same weights, on the same batches."""
    steps = epochs * len(data.train_images) // BATCH
    with Progress("[1/3] Agreement", 3 * steps) as progress:
        return Agreement(
            steps,
            ours=train_fused(data, epochs, progress),
            by_hand=train_by_hand(data, epochs, progress),
            float64=train_by_hand(data, epochs, progress, dtype=torch.float64),
        )


def report(result: Agreement) -> str:
    """The table of part 1."""
    loop = result.by_hand
    budget = (*result.budget(loop.weights), *result.budget(loop.average))
    rows = [
        row("FusedScaledAdamW - torch", result.ours, loop),
        row("torch - float64", loop, result.float64),
        row("FusedScaledAdamW - float64", result.ours, result.float64),
        ["rounding budget", *(f"{value:.1e}" for value in budget), ""],
    ]
    header = ["difference", "weights: max", "relative", "EMA: max", "relative", "EMA accuracy"]
    verdict = "within" if result.within_budget() else "NOT within"
    return (
        f"1. Agreement: AdamW and an EMA with rho = {RHO}, {result.steps} steps from the same "
        f"weights\n\n{table('<>>>>>', header, rows)}\n\n"
        f"   FusedScaledAdamW is {verdict} the budget: {ROUNDINGS} float32 roundings a step that "
        "never cancel.\n   torch: AdamW's for-loop and an EMA by hand, whose accuracy is "
        f"{loop.score.accuracy:.2%}. relative: norm of the difference / norm."
    )


def row(name: str, trained: Trained, reference: Trained) -> list[str]:
    """A row of the table: the difference of two trainings."""
    weights = difference(trained.weights, reference.weights)
    average = difference(trained.average, reference.average)
    values = [f"{value:.1e}" for value in (*weights, *average)]
    return [name, *values, f"{trained.score.accuracy:.2%}"]
