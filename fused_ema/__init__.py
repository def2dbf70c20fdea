"""Fused optimizers that train with a model EMA, scaled to the batch size.

"How to Scale Your EMA" (Busbridge et al., NeurIPS 2023, arXiv 2307.13813): when the batch grows by
``kappa``, the EMA decay ``rho`` must become ``rho**kappa``, and the optimizer follows its own
scaling rules.
"""

from . import posthoc, scaling
from .batchnorm import scale_batchnorm_momentum
from .build import build_info
from .ema.decay import CosineDecay, InverseGammaDecay, PowerDecay, WarmUpDecay, decay_from_half_life
from .ema.migrate import load_ema
from .ema.young import YoungAverageWarning
from .optim.adam import FusedScaledAdam, FusedScaledAdamW
from .optim.any_optimizer import FusedEMA
from .optim.base import FusedScaledOptimizer
from .optim.grad_scaler import GradScaler
from .optim.lamb import FusedScaledLAMB
from .optim.lars import FusedScaledLARS
from .optim.options import EmaOptions
from .optim.rmsprop import FusedScaledRMSprop
from .optim.several import ema_state_dict
from .optim.sgd import FusedScaledSGD
from .optim.trust import trust_groups
from .progressive import ProgressiveScaling

__all__ = [
    "CosineDecay",
    "EmaOptions",
    "FusedEMA",
    "FusedScaledAdam",
    "FusedScaledAdamW",
    "FusedScaledLAMB",
    "FusedScaledLARS",
    "FusedScaledOptimizer",
    "FusedScaledRMSprop",
    "FusedScaledSGD",
    "GradScaler",
    "InverseGammaDecay",
    "PowerDecay",
    "ProgressiveScaling",
    "WarmUpDecay",
    "YoungAverageWarning",
    "build_info",
    "decay_from_half_life",
    "ema_state_dict",
    "load_ema",
    "posthoc",
    "scale_batchnorm_momentum",
    "scaling",
    "trust_groups",
]

__version__ = "0.1.0"
