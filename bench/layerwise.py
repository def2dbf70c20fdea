"""LARS and LAMB as a loop over tensors, with two norms each: what most codebases hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PerTensor(torch.optim.Optimizer):
    """Steps one tensor after the other by ``lr`` times what :meth:`direction` gives."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    direction = self.direction(param, param.grad, group, self.state[param])
                    param.sub_(direction, alpha=group["lr"])

    def direction(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> Tensor:
        raise NotImplementedError


def ratio(weight: Tensor, denominator: Tensor, step: Tensor) -> Tensor:
    """``weight/denominator`` on the device, 1 where a norm is 0."""
    both = (weight > 0) & (step > 0)
    return torch.where(both, weight / denominator, 1.0)


class PerTensorLARS(PerTensor):
    """You, Gitman & Ginsburg 2017, with momentum."""

    def direction(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> Tensor:
        weight, step = param.norm(), grad.norm()
        denominator = step + group["weight_decay"] * weight + group["eps"]
        trust = ratio(group["trust_coefficient"] * weight, denominator, step)
        grad = grad.add(param, alpha=group["weight_decay"]).mul_(trust)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        return buffer


class PerTensorLAMB(PerTensor):
    """You et al. 2020, with bias correction."""

    def direction(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> Tensor:
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(param), "square": torch.zeros_like(param)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["mean"].lerp_(grad, 1 - beta1) / (1 - beta1 ** state["step"])
        square = state["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        direction = mean.div_(root).add_(param, alpha=group["weight_decay"])
        step = direction.norm()
        return direction.mul_(ratio(param.norm(), step, step))
