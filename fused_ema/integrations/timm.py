"""timm: names for its optimizer factory, and its ``ModelEmaV3``.

Importing this module registers ``fusedsgd``, ``fusedadamw`` and so on, for timm's train.py:
``--device-modules fused_ema.integrations.timm --opt fusedadamw --opt-kwargs ema_decay=0.9998``.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch import Tensor, nn

import fused_ema

from .. import FusedEMA, FusedScaledOptimizer
from ..wrapped import unwrapped

PREFIX = "FusedScaled"


def _register() -> None:
    """Register every optimizer under ``fused`` and its torch namesake, with timm's defaults."""
    known = default_registry.list_optimizers()
    for name in fused_ema.__all__:
        short = name.removeprefix(PREFIX).lower()
        if not name.startswith(PREFIX) or name == FusedScaledOptimizer.__name__:
            continue
        info = (
            default_registry.get_optimizer_info(short) if short in known else OptimInfo(short, "")
        )
        text = f"fused_ema.{name}, which keeps a model EMA in its step"
        kind: Any = getattr(fused_ema, name)
        if kind.rule.takes_norms:
            kind = partial(without_decay_alone, kind)
        made = replace(info, name=f"fused{short}", opt_class=kind, description=text)
        default_registry.register(made)


def without_decay_alone(
    kind: type[FusedScaledOptimizer], params: Any, weight_decay: float = 0.0, **options: Any
) -> FusedScaledOptimizer:
    """Make LARS or LAMB, whose ratio timm gives to param groups with weight decay alone.

    Args:
        kind: the optimizer's class.
        params: parameters or param groups; an ``adapt`` of a group is kept.
        weight_decay: of groups that have none of their own.
        **options: of the optimizer.
    """
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    adapting = [
        {"adapt": group.get("weight_decay", weight_decay) != 0.0, **group} for group in groups
    ]
    make: Any = kind
    optimizer: FusedScaledOptimizer = make(adapting, weight_decay=weight_decay, **options)
    return optimizer


_register()


class FusedModelEma(nn.Module):
    """timm's ``ModelEmaV3`` for an optimizer that averages: its step moves this model.

    ``module`` is a copy of the model whose parameters are the optimizer's average, so that
    ``update()`` has nothing to do. The decay is the optimizer's ``ema_decay``, scaled by its
    ``kappa``. Its parameters are float32 unless the model's are float64 or the optimizer has
    ``ema_format="bf16"``.

    Args:
        model: the model, on its device, before DistributedDataParallel or torch.compile wraps it.
        optimizer: a fused optimizer with an ``ema_decay``, made from the model's parameters
            without ``model=`` (as timm's factory does), or its :class:`~fused_ema.FusedEMA`;
            ``module`` becomes its teacher. A state that it has loaded goes on.
        exclude_buffers: take over the model's buffers instead of averaging them.

    Raises:
        TypeError: ``optimizer`` is not from this package.
        ValueError: it has no average, or the model does not hold its parameters.
        RuntimeError: it has a model or a teacher already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedScaledOptimizer,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__()
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, FusedScaledOptimizer):
            raise TypeError(
                f"optimizer: received a {type(optimizer).__name__}; allowed: a fused optimizer, or "
                f"a {FusedEMA.__name__} that follows another one"
            )
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        formats = {group["ema_format"] for group in optimizer.param_groups}
        half = {torch.bfloat16, torch.float16}
        if formats != {"bf16"} and any(param.dtype in half for param in model.parameters()):
            self.module.float()
        mode: Any = "copy" if exclude_buffers else "average"
        optimizer.attach_model(model, teacher=self.module, ema_buffers=mode)

    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Do nothing: the optimizer's step has moved the average."""

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Restart the average at the model's present weights and buffers, in place."""
        own: dict[str, Tensor] = self.module.state_dict()
        for name, value in model.state_dict().items():
            own[name].copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``module``."""
        return self.module(*args, **kwargs)
