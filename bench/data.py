"""Random weights and gradients, drawn once a case and copied for every provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .cases import Case
from .device import Device
from .graphs import Graphed
from .provider import Provider
from .spec import LR, Group, Groups, Parameters, Spec


@dataclass(frozen=True)
class Data:
    """The start of every provider, and the gradients that it gets, up to a factor for each step."""

    case: Case
    weights: Tensor
    grads: Tensor

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: Device, seed: int) -> Data:
        generator = torch.Generator(device.torch_device).manual_seed(seed)
        kind = {"dtype": dtype, "device": device.torch_device}
        weights, grads = (torch.randn(case.numel, generator=generator, **kind) for _ in range(2))
        return cls(case, weights, grads)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of ``flat`` as the case's tensors."""
        sizes = [prod(shape) for shape in self.case.shapes]
        parts = zip(flat.split(sizes), self.case.shapes, strict=True)
        return [part.view(shape) for part, shape in parts]

    def groups(self, params: Parameters) -> Groups:
        """The parameters in the case's groups."""
        ends = self.case.group_ends
        cuts = zip((0, *ends), ends, self.case.lr_factors, strict=False)
        return [Group(params[start:end], lr_factor) for start, end, lr_factor in cuts]


class Running:
    """A provider at work on its own copy of the parameters."""

    def __init__(self, provider: Provider, spec: Spec, data: Data) -> None:
        self.provider = provider
        self._loss_scale = spec.scenario.loss_scale
        self._graphed = spec.scenario.graphed and not provider.bound
        weights, self._grads = data.views(data.weights), data.views(data.grads)
        if provider.bound:
            weights, self._grads = [data.weights.float()], [data.grads.float()]
        self.params = [nn.Parameter(weight.clone()) for weight in weights]
        groups = [Group(self.params)] if provider.bound else data.groups(self.params)
        stepper = provider.make(groups, spec)
        self.step: Callable[[], object] = stepper.step
        self.weights = stepper.weights
        self.emas = stepper.emas
        self.prepare = self.backward if spec.scenario.rule or provider.bound else self.move
        if self._graphed:
            self.step = Graphed(stepper.step, self.params[0].device)
            self.prepare = self.rewrite

    def backward(self, factor: float) -> None:
        """Make gradients in new memory, as zero_grad(set_to_none=True) and a backward pass do."""
        self.zero_grad()
        grads = torch._foreach_mul(self._grads, factor * self._loss_scale)
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def rewrite(self, factor: float) -> None:
        """Write new gradients into the same memory, from which a graph reads them."""
        if self.params[0].grad is None:
            self.backward(factor)
        grads = [param.grad for param in self.params if param.grad is not None]
        torch._foreach_copy_(grads, torch._foreach_mul(self._grads, factor * self._loss_scale))

    @torch.no_grad()
    def move(self, factor: float) -> None:
        """Change the weights, for averages to follow."""
        torch._foreach_add_(self.params, self._grads, alpha=-LR * factor)

    def zero_grad(self) -> None:
        """Drop the gradients, unless a graph reads them."""
        for param in () if self._graphed else self.params:
            param.grad = None
