"""What a command would do, as a table: batches, scaled hyper-parameters, steps and memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..scaling import adaptive_lr, ema_decay, sgd_lr
from .training import Run, Session

HEADER = ("run", "from epoch", "batch", "kappa", "rho", "lr", "per pass", "passes", "steps", "GB")
# Bytes a parameter: weight, gradient, state and average in float32; the teacher is the average.
STATES = {"SGD": 4 + 4 + 4 + 4, "AdamW": 4 + 4 + 8 + 4}


def table(session: Session, model: nn.Module, views: Mapping[int, int]) -> str:
    """A row for each stage of each kind of run.

    Args:
        session: the trainings.
        model: the network that is trained.
        views: number of views of an image by their side, for the activations; empty: they are left
            out of the memory.
    """
    lines = [HEADER, *stages(session, model, views)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADER))]
    rows = [
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    world = session.group.world
    return "\n".join(
        [
            f"{session.folder.experiment}: {len(session.runs)} runs of {session.recipe.epochs} "
            f"epochs of {session.epoch_size} samples, {world} process(es)",
            *rows,
            "rho, lr: scaled to kappa; per pass: samples of a process in a forward pass; passes: "
            "forward passes of a process in a step;",
            "GB: estimated memory of a process: weights, gradients, state, average"
            + (", and activations saved for the backward pass" if views else ""),
        ]
    )


def stages(session: Session, model: nn.Module, views: Mapping[int, int]) -> Iterator[Any]:
    """The cells of every stage of every kind of run."""
    recipe = session.recipe
    for run in {run.kind: run for run in session.runs}.values():
        marks = [*sorted(run.kappas), recipe.epochs]
        for start, end in pairwise(marks):
            kappa = run.kappas[start]
            batch = recipe.batch(kappa)
            micro, passes = session.group.share(batch, recipe.per_device_batch)
            steps = (end - start) * session.epoch_size // batch
            memory = gigabytes(run, model, micro, views, recipe.precision)
            yield (
                run.kind,
                str(start),
                str(batch),
                f"{kappa:g}",
                f"{ema_decay(recipe.rho, kappa if run.rule else 1.0):.6g}",
                f"{scaled_lr(session, run, kappa):.4g}",
                str(micro),
                str(passes),
                str(steps),
                f"{memory:.3g}",
            )


def scaled_lr(session: Session, run: Run, kappa: float) -> float:
    """The learning rate after the warm-up."""
    if run.optimizer == "AdamW":
        return float(adaptive_lr(session.recipe.adamw_lr, kappa))
    return float(sgd_lr(session.recipe.lr, kappa))


def gigabytes(
    run: Run, model: nn.Module, micro: int, views: Mapping[int, int], precision: str
) -> float:
    """Estimated memory of a process in GB."""
    parameters = sum(p.numel() for p in model.parameters())
    width = 0.5 if precision == "bf16" else 1.0
    saved = width * activation_bytes(model, micro, views) if views else 0.0
    return (parameters * STATES[run.optimizer] + saved) / 1e9


def activation_bytes(model: nn.Module, micro: int, views: Mapping[int, int]) -> int:
    """Bytes that a float32 forward pass saves for the backward pass, found without computing."""
    twin = copy.deepcopy(model).to("meta")
    known = {p.untyped_storage()._cdata for p in twin.parameters()}
    kept: list[torch.Tensor] = []  # alive, so that no storage is mistaken for another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            known.add(tensor.untyped_storage()._cdata)
            kept.append(tensor)
        return tensor

    images = [
        torch.empty(micro, channels_of(model), side, side, device="meta")
        for side, count in views.items()
        for _ in range(count)
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        twin(*images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def channels_of(model: nn.Module) -> int:
    """Channels of the images that the network takes: its first convolution's."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
