"""Part 2: the batch grows by kappa, with the EMA rule and with rho left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import FusedScaledAdamW
from .console import Progress, table
from .problem import Digits, Score, evaluate, minibatches, network

KAPPAS = (1, 4, 16)
BASE_BATCH = 8
LR = 2e-3
# Its half-life is 138 base steps = 1,106 samples; left alone at kappa = 16, 17,700 samples.
RHO = 0.995

MAX_BATCH = BASE_BATCH * max(KAPPAS)
SAMPLES_BETWEEN_SCORES = 5 * MAX_BATCH

AVERAGES = ("rule", "rho left alone")


@dataclass(frozen=True)
class Curves:
    """Test scores of one kappa over samples seen.

    Attributes:
        kappa: batch size / base batch size.
        steps: optimizer steps of a run.
        samples: samples seen at each score, ``[points]``.
        scores: loss and accuracy, ``[seeds, points, 3, 2]``, of the average with the rule, of the
            average with rho left alone, and of the weights themselves.
    """

    kappa: int
    steps: int
    samples: Tensor
    scores: Tensor

    def losses(self, average: int) -> Tensor:
        """Test losses ``[seeds, points]``."""
        return self.scores[:, :, average, 0]

    def accuracies(self, average: int) -> Tensor:
        """Test accuracies ``[seeds, points]``."""
        return self.scores[:, :, average, 1]


def train(
    data: Digits, kappa: int, epochs: int, seed: int, progress: Progress
) -> list[list[Score]]:
    """Train at ``kappa`` times the base batch size; one run keeps both averages."""
    model = network(seed)
    optimizer = FusedScaledAdamW(
        model.parameters(),
        lr=LR,
        # Each is raised to kappa: the first becomes RHO**kappa (the rule), the second RHO again.
        ema_decay=(RHO, RHO ** (1 / kappa)),
        kappa=kappa,
    )
    batch = kappa * BASE_BATCH
    scores = [score_all(model, optimizer, data)]
    for step, (images, classes) in enumerate(minibatches(data, batch, epochs, seed), start=1):
        optimizer.zero_grad()
        cross_entropy(model(images), classes).backward()
        optimizer.step()
        if step * batch % SAMPLES_BETWEEN_SCORES == 0:
            scores.append(score_all(model, optimizer, data))
        progress.advance(note=f"(kappa = {kappa}, seed {seed})")
    return scores


def score_all(model: torch.nn.Module, optimizer: FusedScaledAdamW, data: Digits) -> list[Score]:
    """Scores of both averages and of the weights themselves."""
    scores = []
    for index in range(len(AVERAGES)):
        with optimizer.ema_weights(index):
            scores.append(evaluate(model, data))
    return [*scores, evaluate(model, data)]


def run(data: Digits, epochs: int, seeds: int) -> list[Curves]:
    """Train at every kappa with every seed; all see the same samples in the same order."""
    size = epochs * len(data.train_images)
    total = seeds * sum(size // (kappa * BASE_BATCH) for kappa in KAPPAS)
    samples = torch.arange(0, size + 1, SAMPLES_BETWEEN_SCORES)
    with Progress("[2/3] Batch scaling", total) as progress:
        return [
            Curves(
                kappa,
                size // (kappa * BASE_BATCH),
                samples,
                torch.tensor(
                    [train(data, kappa, epochs, seed, progress) for seed in range(seeds)],
                    dtype=torch.float64,
                ),
            )
            for kappa in KAPPAS
        ]


def largest_gap(losses: Tensor, base: Tensor, skip: float = 0.0) -> float:
    """Largest difference of two mean losses over samples seen, from a share of the run on."""
    gaps = (losses.mean(0) - base.mean(0)).abs()
    return gaps[math.ceil(skip * (len(gaps) - 1)) :].max().item()


def spread(values: Tensor, form: str) -> str:
    """Mean over the seeds and, if there are several, their range."""
    mean = format(values.mean().item(), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({values.min().item():{form}} to {values.max().item():{form}})"


def report(curves: Sequence[Curves], data: Digits, epochs: int) -> str:
    """The table of part 2."""
    base = curves[0]
    rows = [row(base, base, 0, "(both the same)")]
    for curve in curves[1:]:
        rows += [row(curve, base, index, name) for index, name in enumerate(AVERAGES)]
    header = ["kappa", "batch", "steps", "EMA", "final loss", "final accuracy"]
    header += ["loss gap", "late"]
    size = epochs * len(data.train_images)
    half_life = BASE_BATCH * math.log(0.5) / math.log(RHO)
    gaps = ", ".join(
        f"{largest_gap(curve.losses(2), base.losses(2)):.2f} at kappa = {curve.kappa}"
        for curve in curves[1:]
    )
    return (
        f"2. Batch scaling: the EMA model on {len(data.test_images)} test images, "
        f"{len(base.scores)} seed(s)\n\n{table('>>><<<>>', header, rows)}\n\n"
        f"   AdamW with lr = {LR}, rho = {RHO} at batch {BASE_BATCH} (an EMA that forgets half in "
        f"{half_life:.0f} samples),\n   {size} samples = {epochs} epoch(s). "
        "kappa scales lr, betas, eps and weight decay in every row.\n"
        "   loss gap: largest distance from kappa = 1 at the same samples seen; late: in the last "
        f"3/4 of them.\n   The weights' own gap, without an EMA: {gaps}."
    )


def row(curve: Curves, base: Curves, index: int, name: str) -> list[str]:
    """A row of the table: one average at one kappa."""
    losses = curve.losses(index)
    gaps = [largest_gap(losses, base.losses(0), skip) for skip in (0.0, 0.25)]
    return [
        str(curve.kappa),
        str(curve.kappa * BASE_BATCH),
        str(curve.steps),
        name,
        spread(losses[:, -1], ".3f"),
        spread(100 * curve.accuracies(index)[:, -1], ".1f") + " %",
        *("-" if curve is base else f"{gap:.3f}" for gap in gaps),
    ]
