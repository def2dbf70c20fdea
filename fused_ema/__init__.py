"""Fused optimizers that train with a model EMA, scaled to the batch size.

"How to Scale Your EMA" (Busbridge et al., NeurIPS 2023, arXiv 2307.13813): when the batch grows by
``kappa``, the EMA's momentum must become ``rho**kappa`` beside the optimizer's own scaling rules.
"""

from . import scaling
from .adam import FusedScaledAdam, FusedScaledAdamW
from .build import build_info
from .ema import CosineDecay
from .optimizer import FusedScaledOptimizer
from .sgd import FusedScaledSGD

__all__ = [
    "CosineDecay",
    "FusedScaledAdam",
    "FusedScaledAdamW",
    "FusedScaledOptimizer",
    "FusedScaledSGD",
    "build_info",
    "scaling",
]

__version__ = "0.1.0"
