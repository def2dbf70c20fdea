"""RMSProp with its batch-size scaling and a fused EMA."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..rules.rmsprop import RMSPROP
from ..scaling import MomentumScaling
from .base import FusedScaledOptimizer
from .options import EmaOptions, documented


@documented
class FusedScaledRMSprop(FusedScaledOptimizer):
    """``torch.optim.RMSprop`` and a model EMA in one pass, both scaled by ``kappa``.

    ``lr`` becomes ``sqrt(kappa)*lr``, ``alpha`` becomes ``alpha**kappa``, ``eps`` becomes
    ``eps/sqrt(kappa)`` (Malladi et al. 2022) and ``rho`` becomes ``rho**kappa`` (Busbridge et al.
    2023); the L2 ``weight_decay`` stays.

    Args:
        {params, lr}
        alpha: decay of the average of squared gradients, in ``[0, 1]``.
        eps: term added to the denominator, ``>= 0``.
        weight_decay: L2 penalty, ``>= 0``.
        momentum: decay of the momentum buffer, ``>= 0``.
        centered: divide by the root of the gradient's variance instead of its mean square. If
            rounding makes a variance negative, it counts as 0, where torch gives NaN.
        {capturable, foreach, maximize, differentiable, fused}
        momentum_scaling: ``"none"`` keeps the momentum; ``"exact"`` uses ``mu**kappa``, and adds an
            update ``(1 - mu**kappa)/(1 - mu)`` times, as :class:`FusedScaledSGD` does with a
            gradient.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    rule = RMSPROP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        momentum_scaling: MomentumScaling = "none",
        **options: Unpack[EmaOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "momentum_scaling": momentum_scaling,
        }
        super().__init__(params, defaults, **options)
