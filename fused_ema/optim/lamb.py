"""LAMB with its batch-size scaling and a fused EMA."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..rules.lamb import LAMB
from ..scaling import BetaScaling
from .base import FusedScaledOptimizer
from .options import EmaOptions, documented


@documented
class FusedScaledLAMB(FusedScaledOptimizer):
    """LAMB (You et al. 2020) and a model EMA, both scaled by ``kappa``.

    A step goes by ``lr*|p|/|u|*u`` with ``u = m/(sqrt(v) + eps) + weight_decay*p``, of Adam's
    bias-corrected moments. The trust ratio ``|p|/|u|`` is 1 if a norm is 0 or not finite. ``lr``
    becomes ``sqrt(kappa)*lr``, ``beta`` becomes ``beta**kappa``, ``eps`` becomes
    ``eps/sqrt(kappa)``, as Adam's, and ``rho`` becomes ``rho**kappa`` (Busbridge et al. 2023).
    ``weight_decay`` becomes ``sqrt(kappa)*weight_decay``, a rule of ours:
    :func:`fused_ema.scaling.normalized_weight_decay` gives the reason.

    Biases and the parameters of norms are usually excluded: :func:`~fused_ema.trust_groups` makes
    the param groups. Norms are of whole parameters, so that parameters cannot be sharded.

    Args:
        {params, lr}
        betas: decays of the averages of gradients and squared gradients, each in ``[0, 1)``.
        eps: term added to the denominator, ``>= 0``.
        weight_decay: coefficient of the weights in ``u``, ``>= 0``.
        {adapt, maximize, foreach, capturable, differentiable, fused}
        beta_scaling: see :class:`FusedScaledAdam`.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    rule = LAMB

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        *,
        adapt: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        beta_scaling: BetaScaling = "exponential",
        **options: Unpack[EmaOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt": adapt,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "beta_scaling": beta_scaling,
        }
        super().__init__(params, defaults, **options)
