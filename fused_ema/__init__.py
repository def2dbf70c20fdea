"""Fused optimizers that train with a model EMA, scaled to the batch size.

"How to Scale Your EMA" (Busbridge et al., NeurIPS 2023, arXiv 2307.13813): when the batch grows by
``kappa``, the EMA's momentum must become ``rho**kappa`` beside the optimizer's own scaling rules.
"""

from . import posthoc, scaling
from .adam import FusedScaledAdam, FusedScaledAdamW
from .any_optimizer import FusedEMA
from .build import build_info
from .ema import (
    CosineDecay,
    InverseGammaDecay,
    PowerDecay,
    WarmUpDecay,
    decay_from_half_life,
)
from .grad_scaler import GradScaler
from .migrate import load_ema
from .optimizer import FusedScaledOptimizer
from .progressive import ProgressiveScaling
from .several import ema_state_dict
from .sgd import FusedScaledSGD

__all__ = [
    "CosineDecay",
    "FusedEMA",
    "FusedScaledAdam",
    "FusedScaledAdamW",
    "FusedScaledOptimizer",
    "FusedScaledSGD",
    "GradScaler",
    "InverseGammaDecay",
    "PowerDecay",
    "ProgressiveScaling",
    "WarmUpDecay",
    "build_info",
    "decay_from_half_life",
    "ema_state_dict",
    "load_ema",
    "posthoc",
    "scaling",
]

__version__ = "0.1.0"
