"""What becomes of gradients on their way into the rule: unscaled, clipped, or not used at all."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import widest
from ..extension import native
from ..realmath import sqrt
from ..sharding import describe_placement, is_sharded

# As torch.nn.utils.clip_grad_norm_ adds to the norm, so that a norm of 0 divides.
EPS = 1e-6

CONTROL_WORDS = 6


def taken(grad: Tensor, param: Tensor, differentiable: bool = False) -> Tensor:
    """A gradient as an update takes it: itself, or where it is no plain memory a copy of that kind.

    Of a parameter that is a tensor subclass it stays what it is: torch's operations take both.

    Raises:
        RuntimeError: as :func:`copied`.
    """
    like = grad.dtype == param.dtype and grad.shape == param.shape and grad.device == param.device
    if like and not is_sharded(grad) and (not native.is_plain(param) or native.is_plain(grad)):
        return grad
    return copied(grad, param, differentiable)


def copied(grad: Tensor, param: Tensor, differentiable: bool = False) -> Tensor:
    """A copy of a gradient in plain memory, in its parameter's dtype and laid out like it.

    What is still being communicated is waited for, what is lazy is carried out.

    Raises:
        RuntimeError: a gradient that no update can take: sparse, of another shape, on another
            device, complex beside a real parameter, a DTensor beside a plain one, or without
            values.
    """
    _check(grad, param)
    with torch.set_grad_enabled(differentiable):
        return torch.empty_like(param, requires_grad=False).copy_(grad)


def _check(grad: Tensor, param: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"sparse gradients are not supported (received layout {grad.layout}, allowed: "
            "torch.strided); use sparse=False in the embedding or torch.optim.SparseAdam"
        )
    castable = torch.can_cast(grad.dtype, param.dtype)
    if not castable or grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"grad does not match its parameter: received {grad.dtype} of shape "
            f"{tuple(grad.shape)} on {grad.device}, allowed {param.dtype} of shape "
            f"{tuple(param.shape)} on {param.device}"
        )
    if is_sharded(grad) and not is_sharded(param):
        raise RuntimeError(
            f"grad does not match its parameter: received a DTensor {describe_placement(grad)}, "
            "allowed: a tensor that is whole in every process, such as grad.full_tensor()"
        )
    if is_fake(grad) and not is_fake(param):
        raise RuntimeError("grad is a fake tensor, without values; its parameter is none")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has shape and dtype alone."""
    # who has one has imported this
    module: Any = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and bool(module.is_fake(tensor))


class Treatment(NamedTuple):
    """What a step makes of its gradients before its rule takes them.

    scale: what they are divided by; None: 1.
    found_inf: one element, not 0 if nothing shall move; None if that is decided.
    max_norm: the largest norm that is left as it is; None: there is no norm to know.
    checked: whether nothing shall move either where a gradient is not finite.
    """

    scale: Tensor | float | None = None
    found_inf: Tensor | None = None
    max_norm: Tensor | float | None = None
    checked: bool = False

    @property
    def measures(self) -> bool:
        """Whether it takes the sum of squares of all gradients."""
        return self.checked or self.max_norm is not None

    @property
    def decided(self) -> bool:
        """Whether the step is surely taken."""
        return self.found_inf is None and not self.checked


class Ending(NamedTuple):
    """How a pass over gradients ends, as kernels take it: ``csrc/norm.h`` names the same.

    sums: parts of the sum of squares, in the order in which they are added up; of their device's
        :func:`~fused_ema.dtypes.widest` dtype.
    control: of the same dtype, see :class:`Control`; written.
    scale, found_inf, max_norm: a number, or where one lies on the same device.
    clips: whether to ``max_norm``.
    checks: whether nothing moves where the sum is not finite.
    """

    sums: Tensor
    control: Tensor
    scale: Tensor | float
    found_inf: Tensor | float
    max_norm: Tensor | float
    clips: bool
    checks: bool

    @classmethod
    def of(cls, treatment: Treatment, sums: Tensor) -> Ending:
        """With a new ``control``."""
        return cls(
            sums,
            torch.empty(CONTROL_WORDS, dtype=sums.dtype, device=sums.device),
            _number(treatment.scale, 1.0, sums.device),
            _number(treatment.found_inf, 0.0, sums.device),
            _number(treatment.max_norm, math.inf, sums.device),
            treatment.max_norm is not None,
            treatment.checked,
        )


def _number(given: Tensor | float | None, default: float, device: torch.device) -> Tensor | float:
    if not isinstance(given, Tensor):
        return default if given is None else float(given)
    if given.device == device and given.dtype in (torch.float32, torch.float64):
        return given.reshape(())
    return given.reshape(()).to(device, widest(device), non_blocking=True)


@torch.no_grad()
def end(ending: Ending) -> None:
    """Add ``sums`` up and write ``control``, by torch's operators; no kernel's bits differ.

    ``min(1, max_norm/(norm + 1e-6))`` is the coefficient of ``torch.nn.utils.clip_grad_norm_``. A
    norm that is a NaN makes every gradient NaN, as in torch.
    """
    squares = ending.sums.sum()
    one = torch.ones_like(squares)
    factor = one / ending.scale
    norm = sqrt(squares) * factor
    if ending.clips:
        factor = (one * ending.max_norm).div_(norm + EPS).clamp_(max=1.0) * factor
    skipped = one * ending.found_inf != 0.0
    if ending.checks:
        skipped = skipped | squares.isfinite().logical_not()
    ending.control[:5].copy_(torch.stack([factor, skipped, norm, ~skipped, squares]))
    _flag(ending.control).copy_(skipped)


def _flag(control: Tensor) -> Tensor:
    return control[5:].view(torch.float32)[0]


class Control:
    """How a step takes its gradients: multiplied by a factor, or not at all.

    Args:
        words: of the device's widest dtype: the factor; 1 if nothing shall move, else 0; the norm
            before clipping; 1 less the second; the sum of squares; and the second once more, in
            float32, at the beginning of the last.
        decided: whether the step is surely taken.
    """

    def __init__(self, words: Tensor, decided: bool) -> None:
        self._words = words
        self._decided = decided
        self._copies: dict[torch.device, Tensor] = {words.device: words}

    def on(self, device: torch.device) -> Tensor:
        """The words, for kernels: they read the first two."""
        if device not in self._copies:
            self._copies[device] = self._words.to(device, widest(device), non_blocking=True)
        return self._copies[device]

    def taken(self, device: torch.device) -> Tensor | None:
        """How many steps are taken, a 0-dim tensor of 1 or 0; None where it is surely 1."""
        return None if self._decided else self.on(device)[3]

    @property
    def norm(self) -> Tensor:
        """The norm of the unscaled gradients, before clipping: a 0-dim tensor."""
        return self._words[2]

    @property
    def squares(self) -> Tensor:
        """The sum of the gradients' squares, as they are: a 0-dim tensor."""
        return self._words[4]

    @property
    def found_inf(self) -> Tensor:
        """Whether nothing moves, as torch's ``GradScaler`` has it: a 0-dim float32 tensor."""
        return _flag(self._words)


class Measured(NamedTuple):
    """What was found out of gradients ahead of their step, for that one alone.

    treatment: what was asked.
    control: what the step takes.
    found_inf: told to the step, and to who asked.
    gradients: which they were.
    """

    treatment: Treatment
    control: Control
    found_inf: Tensor
    gradients: native.Gradients

    def fits(self, treatment: Treatment, params: list[Tensor]) -> bool:
        """Whether a step was told this, and its parameters have the same gradients still."""
        mine, max_norm = self.treatment, treatment.max_norm
        told = treatment.scale is mine.scale and treatment.found_inf is self.found_inf
        if isinstance(max_norm, Tensor) or isinstance(mine.max_norm, Tensor):
            return told and max_norm is mine.max_norm and self.gradients.unchanged(params)
        return told and max_norm == mine.max_norm and self.gradients.unchanged(params)


class Verdict:
    """Whether a step was skipped, to be asked later: nothing waits for the device until then.

    Args:
        found_inf: one element, not 0 if the step is skipped; copied.
    """

    def __init__(self, found_inf: Tensor) -> None:
        on_device = not found_inf.is_cpu
        # a copy into memory that is not pinned would wait
        self._found_inf = torch.empty_like(found_inf, device="cpu", pin_memory=on_device)
        self._found_inf.copy_(found_inf, non_blocking=True)
        self._arrived = torch.Event(found_inf.device) if on_device else None
        if self._arrived is not None:
            self._arrived.record()

    def skipped(self) -> bool:
        """Wait until the copy has arrived, if it has not."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._found_inf.item() != 0.0
