"""Param groups for optimizers with trust ratios."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def trust_groups(
    params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> list[dict[str, Any]]:
    """Param groups of LARS and LAMB: parameters of two or more dimensions, and all others.

    The others (biases, the parameters of norms, scalars) take neither a trust ratio nor weight
    decay, as usual: their group has ``adapt=False`` and ``weight_decay=0``. A group that would be
    empty is left out.

    Example:
        ``FusedScaledLARS(trust_groups(model), lr=0.2, weight_decay=1e-6)``

    Args:
        params: a module, its parameters or its named parameters. Those of a module keep their
            names.
    """
    given: list[Any] = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    adapted: list[Any] = []
    others: list[Any] = []
    for entry in given:
        param = entry[1] if isinstance(entry, tuple) else entry
        (adapted if param.dim() > 1 else others).append(entry)
    groups: list[dict[str, Any]] = [
        {"params": adapted},
        {"params": others, "adapt": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
