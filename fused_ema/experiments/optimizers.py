"""The optimizer of a run, at the base batch size: SGD or AdamW, with an average for each part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import nn

from .. import FusedScaledAdamW, FusedScaledOptimizer, FusedScaledSGD
from ..ema.decay import Decay
from ..optim.options import EmaOptions
from .recipe import Recipe
from .training import Run

Decays: TypeAlias = Decay | tuple[Decay, ...] | None


def make_optimizer(
    recipe: Recipe, run: Run, parts: Sequence[tuple[nn.Module, Decays]], options: EmaOptions
) -> FusedScaledOptimizer:
    """The run's optimizer.

    Args:
        recipe: its hyper-parameters.
        run: chooses SGD or AdamW.
        parts: each module that is trained, with the base decay of its average or averages; None:
            it has no average. Biases, norms and what timm exempts have no weight decay.
        options: how the averages are kept.
    """
    from timm.optim import param_groups_weight_decay

    adamw = run.optimizer == "AdamW"
    decay = recipe.adamw_weight_decay if adamw else recipe.weight_decay
    groups = [
        {**group, "ema_decay": ema_decay}
        for part, ema_decay in parts
        for group in param_groups_weight_decay(part, decay, exempt(part))
    ]
    if adamw:
        betas = (recipe.beta1, recipe.beta2)
        return FusedScaledAdamW(groups, lr=recipe.adamw_lr, betas=betas, **options)
    return FusedScaledSGD(groups, lr=recipe.lr, momentum=recipe.momentum, **options)


def exempt(part: nn.Module) -> set[str]:
    """The parameters that timm's model names as without weight decay, such as ``pos_embed``."""
    names = getattr(part, "no_weight_decay", set)
    return set(names())
