"""Trust ratios: how long the step of a whole tensor is beside the tensor itself.

``scaled`` is what a rule's ``update`` makes of a ratio. Kernels do not see whole tensors: they take
norms in a pass before the step, which a rule asks for with a last scalar named ``trust``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import widest
from .tensorlist import TensorList


def norm(values: Any) -> Any:
    """The Euclidean norm, in the widest dtype: 0-dim, or one a tensor of a list."""
    if isinstance(values, TensorList):
        wide = widest(values.tensors[0].device)
        return torch.stack(torch._foreach_norm(values.tensors, 2, dtype=wide))
    if isinstance(values, Tensor):
        return torch.linalg.vector_norm(values, dtype=widest(values.device))
    return values.clone().norm()  # backward needs the values, which may be written after this


def ratio(weight: Any, step: Any, denominator: Any, coefficient: Any = 1.0) -> Any:
    """``coefficient*weight/denominator``, or 1 unless the norms are both above 0 and finite.

    Args:
        weight: the norm of the parameter.
        step: the norm of what steps it.
        denominator: above 0 where both norms are.
        coefficient: a number.
    """
    none = _counts(weight).logical_and(_counts(step)).logical_not()
    ratio = weight.mul(coefficient).div(denominator.masked_fill(none, 1.0))
    return ratio.masked_fill(none, 1.0)


def scaled(values: Any, ratio: Any) -> Any:
    """``values`` times their ratio, rounded to their dtype first: that of each of a list."""
    if isinstance(values, TensorList):
        factors = ratio.to(values.tensors[0].dtype).unbind()
        return values.mul(TensorList(factors))
    return values.mul(ratio.type_as(values))


def _counts(norm: Any) -> Any:
    return norm.gt(0.0).logical_and(norm.isfinite())
