"""The work of one step: an optimizer with hyper-parameters, and the scenario around its rule.

Every provider gets the same hyper-parameters: ours as base values and ``KAPPA``, others as the
scaled values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import nn

from fused_ema import (
    FusedScaledAdamW,
    FusedScaledLAMB,
    FusedScaledLARS,
    FusedScaledSGD,
    scaling,
)

from .layerwise import PerTensorLAMB, PerTensorLARS

# Large enough that the check notices after a few steps if any one is left out; a step's time does
# not depend on them.
KAPPA = 2.0
EMA_DECAYS = (0.9, 0.8, 0.95)
LR, BETAS, EPS, MOMENTUM, WEIGHT_DECAY = 1e-2, (0.9, 0.99), 1e-2, 0.9, 0.1
TRUST_COEFFICIENT = 1.0
LOSS_SCALE = 1024.0

Parameters = list[nn.Parameter]


@dataclass(frozen=True)
class Group:
    """Parameters whose learning rate is ``LR`` times a factor."""

    params: Parameters
    lr_factor: float = 1.0


Groups = Sequence[Group]


def flat(groups: Groups) -> Parameters:
    return [param for group in groups for param in group.params]


@dataclass(frozen=True)
class Scenario:
    """The work of one step.

    title: its name in a table's heading.
    num_averages: number of averages.
    rule: whether the optimizer steps; if not, averages follow weights that move by themselves.
    clip: gradients are clipped by their norm.
    scaled: gradients come multiplied by ``LOSS_SCALE``, and are unscaled and checked.
    master: parameters are bfloat16, with float32 masters.
    ema_format: the format of our averages.
    graphed: from the second time on, the step is a replay of a CUDA graph.
    norm_error: allowed relative error of the norm that clips. torch sums squares in float32, which
    is off by 0.1 % for 20 million elements on a processor.
    """

    name: str
    title: str
    num_averages: int = 1
    rule: bool = True
    clip: bool = False
    scaled: bool = False
    master: bool = False
    ema_format: str = "full"
    graphed: bool = False
    norm_error: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and gradients."""
        return torch.bfloat16 if self.master else torch.float32

    @property
    def base_decays(self) -> tuple[float, ...]:
        return EMA_DECAYS[: self.num_averages]

    @property
    def decays(self) -> tuple[float, ...]:
        return tuple(decay**KAPPA for decay in self.base_decays)

    @property
    def loss_scale(self) -> float:
        return LOSS_SCALE if self.scaled else 1.0


STEP = Scenario("step", "step + EMA")
CLIP = Scenario("clip", "clip + step + EMA", clip=True, norm_error=5e-3)
CHAIN = replace(CLIP, name="chain", title="unscale + clip + step + EMA", scaled=True)
THREE = Scenario("three_emas", "step + 3 EMAs", num_averages=3)
BF16 = Scenario(
    "bf16",
    "bfloat16 parameters, float32 masters, bfloat16 EMA",
    master=True,
    ema_format="bf16",
)
EMA = Scenario("ema", "EMA alone", rule=False)
GRAPH, CLIP_GRAPH = (
    replace(
        scenario,
        name=name,
        title=f"{scenario.title}, replayed as a CUDA graph",
        graphed=True,
    )
    for name, scenario in (("graph", STEP), ("clip_graph", CLIP))
)
SCENARIOS = {
    scenario.name: scenario for scenario in (STEP, CLIP, CHAIN, THREE, BF16, EMA, GRAPH, CLIP_GRAPH)
}


def max_norm(params: Sequence[torch.Tensor]) -> float:
    """A limit below the norm of the drawn gradients, so that they are clipped."""
    return 0.5 * sqrt(sum(param.numel() for param in params))


@dataclass(frozen=True)
class Spec:
    """One optimizer, ours and torch's, in a scenario.

    base: arguments of our optimizer, at the base batch size.
    scaled: arguments of torch's at ``KAPPA`` times that, for a base learning rate.
    num_states: number of state tensors that a step reads and writes.
    num_measured: number of arrays besides the gradients of which a pass before the step takes
        norms; torch's is then a loop over tensors of ours, because torch has none.
    """

    name: str
    ours: Callable[..., torch.optim.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    base: Mapping[str, Any]
    scaled: Callable[[float], Mapping[str, Any]]
    num_states: int
    num_measured: int = 0
    scenario: Scenario = STEP

    @property
    def bytes_per_param(self) -> int:
        """The bytes a step must move: each array read once, and all but the gradients written once.

        Clipping needs the norm first, so it reads gradients once more, and trust ratios need norms.
        Parameters that are copies of their masters are only written.
        """
        full, own = torch.float32.itemsize, self.scenario.dtype.itemsize
        averages = self.scenario.num_averages * own
        if not self.scenario.rule:
            return full + 2 * averages
        gradients = own * (2 if self.scenario.clip else 1)
        if self.num_measured:
            gradients += own + self.num_measured * full
        copies = own if self.scenario.master else 0
        return 2 * (full + self.num_states * full + averages) + gradients + copies

    @property
    def num_arrays(self) -> int:
        """Number of float32 arrays that a provider may hold, including the gradients."""
        masters = 2 if self.scenario.master else 0
        return 2 + self.num_states + self.scenario.num_averages + masters

    def make_ours(self, groups: Groups, **flags: Any) -> torch.optim.Optimizer:
        own = [{"params": g.params, "lr": LR * g.lr_factor} for g in groups]
        return self.ours(own, **self.base, **flags)

    def make_torch(self, groups: Groups, **flags: Any) -> torch.optim.Optimizer:
        own = [{"params": g.params, **self.scaled(LR * g.lr_factor)} for g in groups]
        return self.torch(own, **flags)


def scaled_adamw(base_lr: float) -> Mapping[str, Any]:
    lr = scaling.adaptive_lr(base_lr, KAPPA)
    decay = scaling.decoupled_decay(base_lr, lr, WEIGHT_DECAY, KAPPA, "exact")
    return {
        "lr": lr,
        "betas": tuple(1.0 - scaling.beta_weight(beta, KAPPA) for beta in BETAS),
        "eps": scaling.adaptive_eps(EPS, KAPPA),
        "weight_decay": decay / lr,
    }


def scaled_sgd(base_lr: float) -> Mapping[str, Any]:
    return {**SGD, "lr": scaling.sgd_lr(base_lr, KAPPA)}


def scaled_lars(base_lr: float) -> Mapping[str, Any]:
    return {**LARS, "lr": scaling.sgd_lr(base_lr, KAPPA)}


def scaled_lamb(base_lr: float) -> Mapping[str, Any]:
    return {
        "lr": scaling.adaptive_lr(base_lr, KAPPA),
        "betas": tuple(1.0 - scaling.beta_weight(beta, KAPPA) for beta in BETAS),
        "eps": scaling.adaptive_eps(EPS, KAPPA),
        "weight_decay": scaling.normalized_weight_decay(WEIGHT_DECAY, KAPPA),
    }


ADAMW = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
SGD = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
LARS = {**SGD, "trust_coefficient": TRUST_COEFFICIENT, "eps": EPS}
OPTIMIZERS = {
    spec.name: spec
    for spec in (
        Spec("adamw", FusedScaledAdamW, torch.optim.AdamW, ADAMW, scaled_adamw, num_states=2),
        Spec("sgd", FusedScaledSGD, torch.optim.SGD, SGD, scaled_sgd, num_states=1),
        Spec("lars", FusedScaledLARS, PerTensorLARS, LARS, scaled_lars, 1, num_measured=1),
        Spec("lamb", FusedScaledLAMB, PerTensorLAMB, ADAMW, scaled_lamb, 2, num_measured=3),
    )
}
