"""BatchNorm's running statistics at another batch size."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .checks import check_kappa
from .scaling import ema_rate


def scale_batchnorm_momentum(model: nn.Module, kappa: float) -> None:
    """Let the running statistics of all BatchNorm layers decay as ``kappa`` base steps do.

    The statistics are running averages of the batches, so their decay ``1 - momentum`` scales as
    ``rho`` does: ``momentum_hat = 1 - (1 - momentum)**kappa`` (EMA Scaling Rule, Busbridge et al.
    2023, applied to any running average). It modifies ``momentum`` of the layers in place. The
    base value of each layer is kept beside it, so that a second call replaces the first. A value
    that is set by hand after a call is the base value of the next one.

    Args:
        model: a module. Layers with ``momentum=None``, which average all batches alike, and
            layers without running statistics stay as they are.
        kappa: batch size of a forward pass / base batch size, ``> 0``. With accumulation, that is
            less than the optimizer's ``kappa``. Count the samples of all processes: for
            SyncBatchNorm they enter the statistics, and otherwise each process sees its share.

    Raises:
        ValueError: ``kappa`` is not a positive number.
    """
    check_kappa(kappa)
    for module in model.modules():
        if isinstance(module, _NormBase) and module.momentum is not None:
            base = base_momentum(module, module.momentum)
            module.momentum = base if kappa == 1 else ema_rate(1.0 - base, kappa)
            module.__dict__["_momentum_at_base"] = (module.momentum, base)


def base_momentum(module: _NormBase, momentum: float) -> float:
    """The momentum at the base batch, unless another one was set since the last scaling."""
    scaled, base = module.__dict__.get("_momentum_at_base", (None, momentum))
    return float(base if momentum == scaled else momentum)
