"""LARS with its batch-size scaling and a fused EMA."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..rules.lars import LARS
from ..scaling import MomentumScaling
from .base import FusedScaledOptimizer
from .options import EmaOptions, documented


@documented
class FusedScaledLARS(FusedScaledOptimizer):
    """LARS (You, Gitman & Ginsburg 2017) and a model EMA, both scaled by ``kappa``.

    SGD whose gradient ``g + weight_decay*p`` is multiplied by the trust ratio
    ``trust_coefficient*|p|/(|g| + weight_decay*|p| + eps)`` of its parameter before it enters the
    momentum. The ratio is 1 if ``|p|`` or ``|g|`` is 0 or not finite. ``g`` is the gradient after
    unscaling and clipping. ``lr`` becomes ``kappa*lr`` (linear rule) and ``rho`` becomes
    ``rho**kappa`` (Busbridge et al. 2023).

    Biases and the parameters of norms are usually excluded: :func:`~fused_ema.trust_groups` makes
    the param groups. Norms are of whole parameters, so that parameters cannot be sharded.

    Args:
        {params, lr}
        momentum: decay of the momentum buffer, ``>= 0``.
        weight_decay: L2 penalty, ``>= 0``.
        nesterov: needs ``momentum > 0``.
        trust_coefficient: factor of the ratio, ``>= 0``.
        eps: term added to the ratio's denominator, ``>= 0``.
        {adapt, maximize, foreach, capturable, differentiable, fused}
        momentum_scaling: see :class:`FusedScaledSGD`.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    rule = LARS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        adapt: bool = True,
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
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapt": adapt,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "momentum_scaling": momentum_scaling,
        }
        super().__init__(params, defaults, **options)
