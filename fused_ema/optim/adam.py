"""Adam and AdamW with their batch-size scaling and a fused EMA."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..rules.adam import ADAM
from ..scaling import BetaScaling, WeightDecayScaling
from .base import FusedScaledOptimizer
from .options import EmaOptions, documented


@documented
class FusedScaledAdam(FusedScaledOptimizer):
    """``torch.optim.Adam`` and a model EMA in one pass, both scaled by ``kappa``.

    ``lr`` becomes ``sqrt(kappa)*lr``, ``beta`` becomes ``beta**kappa``, ``eps`` becomes
    ``eps/sqrt(kappa)`` (Malladi et al. 2022) and ``rho`` becomes ``rho**kappa`` (Busbridge et al.
    2023). ``state[p]["step"]`` counts base steps, and each step adds ``kappa`` to it, so that bias
    correction stays right when ``kappa`` changes.

    Args:
        {params, lr}
        betas: decays of the averages of gradients and squared gradients, each in ``[0, 1)``.
        eps: term added to the denominator, ``>= 0``.
        weight_decay: L2 penalty, or decoupled decay, ``>= 0``.
        amsgrad: use the running maximum of the second moment.
        {foreach, maximize, capturable, differentiable, fused}
        decoupled_weight_decay: apply AdamW's decay instead of the L2 penalty.
        beta_scaling: ``"exponential"``, ``beta**kappa``, or ``"linear"``, ``1 - kappa*(1 - beta)``.
            With ``"linear"``, bias correction after a change of ``kappa`` is computed as if all
            base steps had been taken at the new ``kappa``, and the step warns if that changes its
            length by more than 0.2 %. With ``"exponential"`` it is exact.
        weight_decay_scaling: for decoupled decay only. ``"exact"``: a step keeps
            ``(1 - lr*weight_decay)**kappa`` of a weight; ``"none"``: the coefficient is unchanged.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    rule = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        beta_scaling: BetaScaling = "exponential",
        weight_decay_scaling: WeightDecayScaling = "exact",
        **options: Unpack[EmaOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "beta_scaling": beta_scaling,
            "weight_decay_scaling": weight_decay_scaling,
        }
        super().__init__(params, defaults, **options)


@documented
class FusedScaledAdamW(FusedScaledAdam):
    """``torch.optim.AdamW`` and a model EMA in one pass, both scaled by ``kappa``.

    :class:`FusedScaledAdam` with decoupled weight decay (Loshchilov & Hutter 2019): a step keeps
    ``(1 - lr*weight_decay)**kappa`` of a weight.

    Args:
        {params, lr}
        betas: decays of the averages of gradients and squared gradients, each in ``[0, 1)``.
        eps: term added to the denominator, ``>= 0``.
        weight_decay: decoupled decay, ``>= 0``.
        amsgrad: use the running maximum of the second moment.
        {maximize, foreach, capturable, differentiable, fused}
        beta_scaling, weight_decay_scaling: see :class:`FusedScaledAdam`.
        {options}

    Raises:
        ValueError: a bad value; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        beta_scaling: BetaScaling = "exponential",
        weight_decay_scaling: WeightDecayScaling = "exact",
        **options: Unpack[EmaOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            beta_scaling=beta_scaling,
            weight_decay_scaling=weight_decay_scaling,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["decoupled_weight_decay"] = True
        super().__setstate__(state)
