"""Adam's bias corrections where ``kappa`` changes under ``beta_scaling="linear"``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ..realmath import expm1, log1p

# Smallest relative error of a step's length that is worth a warning.
TOLERANCE = 2e-3


def follow_kappa(group: dict[str, Any], kappa: float) -> None:
    """Warn where a change of ``kappa`` makes the corrections of a linear group's next step wrong.

    They are made from the count of base steps, as if all had been taken at today's ``kappa``: one
    count cannot hold the products of two linear betas. The ``kappa`` of the last step is kept in
    the group as ``stepped_kappa``, so that a change is seen across a checkpoint, too. Groups that
    fold on their device are not looked at. The error is that of parameters that have had a
    gradient at every step, and whose steps have all been taken at the last ``kappa``.

    Args:
        group: a param group with ``beta_scaling="linear"``; ``stepped_kappa`` is written.
        kappa: of the step at hand, in its range; NaN where it is a tensor on a device.
    """
    before = group.get("stepped_kappa", kappa)
    if group["capturable"] or math.isnan(kappa):
        return
    group["stepped_kappa"] = kappa
    steps = float(group["base_steps"])
    if before == kappa or not (steps > 0.0 and before > 0.0):
        return
    error = step_error(group, steps, before, kappa)
    if abs(error) > TOLERANCE:
        warnings.warn(
            f"kappa={kappa} after {before} at base step {steps:g} with beta_scaling='linear': the "
            "bias corrections take all steps for steps at today's kappa, which changes the length "
            f"of this step by {100 * error:+.1f} % (docs/numerics.md); use "
            "beta_scaling='exponential', which is exact, or change kappa later",
            stacklevel=2,
        )


def step_error(group: Mapping[str, Any], steps: float, before: float, kappa: float) -> float:
    """By what share a step at ``kappa`` is too long after ``steps`` base steps at ``before``."""
    lengths = []
    for old in (kappa, before):
        products = [
            steps * _log_beta(float(beta), old) + kappa * _log_beta(float(beta), kappa)
            for beta in group["betas"]
        ]
        first, second = (-expm1(product) for product in products)
        lengths.append(math.sqrt(second) / first)
    return lengths[0] / lengths[1] - 1.0


def _log_beta(beta: float, kappa: float) -> float:
    """``log(beta)`` of one base step under the linear rule."""
    return log1p(-kappa * (1.0 - beta)) / kappa
