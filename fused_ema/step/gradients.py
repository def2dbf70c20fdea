"""What becomes of gradients on their way into the rule: unscaled, clipped, or not used at all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..extension import native
from ..realmath import sqrt
from ..sharding import is_sharded, place

# As torch.nn.utils.clip_grad_norm_ adds to the norm, so that a norm of 0 divides.
EPS = 1e-6


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
            f"grad does not match its parameter: received a DTensor {place(grad)}, allowed: a "
            "tensor that is whole in every process, such as grad.full_tensor()"
        )
    if is_fake(grad) and not is_fake(param):
        raise RuntimeError("grad is a fake tensor, without values; its parameter is none")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has shape and dtype alone."""
    # who has one has imported this
    module: Any = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and bool(module.is_fake(tensor))


class Control:
    """How a step takes its gradients: multiplied by ``factor``, or not at all.

    Args:
        factor: 0-dim float64 tensor.
        found_inf: 0-dim float64 tensor, not 0 if nothing shall move; None if that is decided.
    """

    def __init__(self, factor: Tensor, found_inf: Tensor | None) -> None:
        skip = torch.zeros_like(factor) if found_inf is None else found_inf.to(factor.device)
        self._words = torch.stack([factor, skip])
        self.found_inf = found_inf
        self._copies: dict[torch.device, Tensor] = {self._words.device: self._words}

    def on(self, device: torch.device) -> Tensor:
        """``[factor, found_inf]`` in float64, for kernels."""
        if device not in self._copies:
            self._copies[device] = self._words.to(device, non_blocking=True)
        return self._copies[device]

    def taken(self, device: torch.device) -> Tensor | None:
        """How many steps are taken, a 0-dim float64 tensor of 1 or 0; None where it is surely 1."""
        return None if self.found_inf is None else (self.on(device)[1] == 0.0).double()


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


@torch.no_grad()
def unscaling(grad_scale: Tensor | None, found_inf: Tensor | None) -> Control:
    """Multiply by ``1/grad_scale``.

    Args:
        grad_scale: one element; None: 1.
        found_inf: one element, not 0 if nothing shall move; None if that is decided.
    """
    device = next(given.device for given in (grad_scale, found_inf) if given is not None)
    one = torch.ones((), dtype=torch.float64, device=device)
    skip = None if found_inf is None else found_inf.double().reshape(())
    return Control(one if grad_scale is None else one / grad_scale.reshape(()), skip)


def summed(squares: Sequence[Tensor]) -> Tensor:
    """The sum on the first's device; of none, as of a process without parameters, 0 on the CPU."""
    if not squares:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    first = squares[0].device
    return torch.stack([s.to(first, non_blocking=True) for s in squares]).sum()


@torch.no_grad()
def clipped(
    control: Control | None, squares: Sequence[Tensor], max_norm: float
) -> tuple[Control, Tensor]:
    """Also multiply by ``min(1, max_norm/(norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_``.

    Args:
        control: what gradients are multiplied by before.
        squares: sums of squares of all gradients, 0-dim float64 tensors on any devices.
        max_norm: the largest norm that is left as it is.

    Returns:
        The control, and the norm before clipping: a 0-dim float64 tensor on the first device. A
        NaN norm makes every gradient NaN, as in torch.
    """
    norm = sqrt(summed(squares))
    factor, found_inf = None, None
    if control is not None:
        factor, found_inf = control.on(norm.device)[0], control.found_inf
        norm = norm * factor
    coefficient = torch.full_like(norm, max_norm).div_(norm + EPS).clamp_(max=1.0)
    return Control(coefficient if factor is None else coefficient * factor, found_inf), norm
