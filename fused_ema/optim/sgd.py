"""SGD with its batch-size scaling and a fused EMA."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..rules.sgd import SGD
from ..scaling import MomentumScaling
from .base import FusedScaledOptimizer
from .options import EmaOptions, documented


@documented
class FusedScaledSGD(FusedScaledOptimizer):
    """``torch.optim.SGD`` and a model EMA in one pass, both scaled by ``kappa``.

    ``lr`` becomes ``kappa*lr`` (linear rule) and ``rho`` becomes ``rho**kappa`` (Busbridge et al.
    2023); the L2 ``weight_decay`` stays.

    Args:
        {params, lr}
        momentum: decay of the momentum buffer, ``>= 0``.
        dampening: the gradient enters the momentum with weight ``1 - dampening``.
        weight_decay: L2 penalty, ``>= 0``.
        nesterov: needs ``momentum > 0`` and ``dampening = 0``.
        {maximize, foreach, capturable, differentiable, fused}
        momentum_scaling: ``"none"`` keeps the momentum (the paper's experiments); ``"exact"`` uses
            ``mu**kappa``, and adds a gradient ``(1 - mu**kappa)/(1 - mu)`` times, as ``kappa`` base
            steps do. ``momentum_buffer`` is in units of the base batch, so that it stays valid when
            ``kappa`` changes.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    rule = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        momentum_scaling: MomentumScaling = "none",
        **options: Unpack[EmaOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "momentum_scaling": momentum_scaling,
        }
        super().__init__(params, defaults, **options)

    def _entry_to_save(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Save a momentum buffer that has seen no gradient yet as None.

        Torch then starts it as the gradient itself; it would dampen the gradient for a buffer of
        zeros.
        """
        if entry.get("momentum_buffer") is not None and entry["step"] == 0:
            return {**entry, "momentum_buffer": None}
        return entry
